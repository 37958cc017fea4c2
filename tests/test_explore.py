"""examples/explore.py runs, with few steps, and its numbers say what they should."""

import re
from pathlib import Path

import pytest
from helpers.forking import ROOT, python_here
from PIL import Image

EXAMPLE = ROOT / "examples" / "explore.py"


@pytest.fixture(scope="module")
def explored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Where it ran, and what it printed."""
    folder = tmp_path_factory.mktemp("explored")
    done = python_here().complete(str(EXAMPLE), "8", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_it_writes_a_sheet(explored):
    folder, printed = explored
    with Image.open(folder / "outputs" / "explore.png") as sheet:
        assert sheet.size == (5 * 184, 6 * 150)
        assert len(sheet.convert("RGB").getcolors(2**20) or ()) > 1000
    assert "outputs/explore.png" in printed


def test_a_picture_is_likeliest_under_its_own_words(explored):
    found = re.findall(r"bits own (\S+), none (\S+), other (\S+)", explored[1])
    assert len(found) == 4
    for own, none, other in found:
        assert float(own) < min(float(none), float(other))


def test_an_inverted_picture_is_drawn_again(explored):
    distances = [float(text) for text in re.findall(r"drawn again, (\S+) off", explored[1])]
    assert len(distances) == 4 and max(distances) < 0.3


def test_it_is_short_and_in_cells():
    text = EXAMPLE.read_text()
    assert 60 <= len(text.splitlines()) <= 100 and text.count("# %%") >= 5
