"""docs/mathematics_pictures.py: it draws every picture of the page, and the page shows every picture."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "mathematics_pictures.py"


def load_script():
    spec = importlib.util.spec_from_file_location("mathematics_pictures", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()
NAMES = list(script.PICTURES)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_drawn(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--only", name, "--outdir", str(tmp_path / "new")])
    script.main()
    (drawn,) = (tmp_path / "new").iterdir()
    assert drawn.name == f"{name}.png" and drawn.stat().st_size < 150_000
    with Image.open(drawn) as picture:
        assert picture.width == 1000
        colors = picture.convert("RGB").getcolors(maxcolors=256)
    assert colors is not None and len(colors) > 50  # a blank one has few
    assert max(colors)[1] == (255, 255, 255)


def test_a_walk_goes_from_the_start_to_the_data():
    start = torch.randn(8, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    walked = script.walk("euler", start, 100)
    assert walked.shape == (101, 8, 2)
    assert torch.equal(walked[0], start)
    away = torch.cdist(walked[-1], torch.tensor(script.CENTRES).double()).amin(1)
    assert away.max() < 4 * script.SPREAD


def test_the_page_shows_every_picture_that_is_there():
    shown = re.findall(r"\]\(mathematics/(\w+)\.png\)", (ROOT / "docs" / "mathematics.md").read_text())
    kept = [path.name for path in (ROOT / "docs" / "mathematics").iterdir()]
    assert sorted(kept) == sorted(f"{name}.png" for name in NAMES)
    assert sorted(shown) == sorted(NAMES)


def test_help_imports_nothing_heavy():
    python = [sys.executable, "-X", "importtime"]
    result = subprocess.run([*python, SCRIPT, "--help"], capture_output=True, text=True, check=True, timeout=60)
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported and "--only" in result.stdout
    assert not imported & {"torch", "numpy", "matplotlib", "PIL"}
