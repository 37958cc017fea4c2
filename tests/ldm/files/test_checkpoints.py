"""Which checkpoints stay, whatever happens to them."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pytest
from helpers.checkpoint_damages import (
    LATEST_DAMAGES,
    a_block_is_zero,
    a_file_is_a_folder,
    a_file_is_cut,
    a_file_is_missing,
    a_file_is_stray,
    one_bit_flips,
    two_files_are_swapped,
)
from helpers.points import Calls, Death
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.files.checkpoints import Checkpoints, Digest, fault, remove, step_of

NAMES = ("rank_00000.safetensors", "rank_00001.safetensors", "state.json")
TEARS = [a_block_is_zero, a_file_is_a_folder, a_file_is_cut, a_file_is_missing, a_file_is_stray, one_bit_flips]
TEARS += [two_files_are_swapped]


def partial_folder(checkpoints: Checkpoints, step: int) -> tuple[Path, dict[str, Digest]]:
    """What all ranks have written of a checkpoint, before it has its name."""
    partial = checkpoints.path(step).with_name(f"step_{step:07d}.partial")
    partial.mkdir(parents=True)
    for name in NAMES:
        (partial / name).write_bytes(random.Random(f"{step} {name}").randbytes(1000))
    return partial, {name: Digest.of(partial / name) for name in NAMES}


def add(checkpoints: Checkpoints, *steps: int) -> list[Path]:
    with patch("os.fsync", lambda descriptor: None):
        return [checkpoints.commit(*partial_folder(checkpoints, step)) for step in steps]


def steps_of(paths: list[Path]) -> list[int]:
    return [step_of(path) for path in paths]


def good_steps(folder: Path) -> set[int]:
    """By the bytes that lie there, not by what anybody remembers."""
    return {step_of(path) for path in Checkpoints(folder, keep=1).all() if fault(path) is None}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)


def test_checkpoints_are_listed_by_their_number(checkpoints: Checkpoints):
    assert checkpoints.all() == []
    add(checkpoints, 9_999_999, 10_000_000, 100, 20)
    (checkpoints.folder / "step_0000300.partial").mkdir()
    (checkpoints.folder / "step_0000400.damaged").mkdir()
    (checkpoints.folder / "step_0000500").touch()
    assert steps_of(checkpoints.all()) == [20, 100, 9_999_999, 10_000_000]
    with pytest.raises(ValueError, match="step_0000300.partial is not named like a checkpoint"):
        step_of(checkpoints.folder / "step_0000300.partial")


def test_a_committed_checkpoint_is_whole_and_the_latest(checkpoints: Checkpoints):
    (path,) = add(checkpoints, 7)
    assert path == checkpoints.path(7) and fault(path) is None and checkpoints.is_good(path)
    assert {path.name for path in checkpoints.folder.iterdir()} == {"step_0000007", "latest"}
    assert (checkpoints.folder / "latest").read_text() == "step_0000007\n"


@pytest.mark.parametrize("damage", LATEST_DAMAGES, ids=lambda damage: damage.__name__)
def test_nothing_depends_on_what_is_called_the_latest(checkpoints: Checkpoints, damage: Callable[[Path], None]):
    add(checkpoints, 1, 2)
    damage(checkpoints.folder / "latest")
    assert steps_of(checkpoints.all()) == [1, 2] and good_steps(checkpoints.folder) == {1, 2}
    add(checkpoints, 3)
    checkpoints.prune()
    assert good_steps(checkpoints.folder) == {2, 3}
    outside = checkpoints.folder.parent / "outside"
    assert not outside.exists() or outside.read_text() == "untouched"


def test_a_checkpoint_is_read_once_and_trusted_from_then_on(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    add(checkpoints, 1)
    asked: list[Path] = []
    monkeypatch.setattr("ldm.files.checkpoints.fault", lambda path: asked.append(path))
    assert checkpoints.is_good(checkpoints.path(1)) and not asked  # written by this process
    another = Checkpoints(checkpoints.folder, keep=2)
    assert another.is_good(another.path(1)) and another.is_good(another.path(1))
    assert asked == [another.path(1)]
    third = Checkpoints(checkpoints.folder, keep=2)
    third.trust(third.path(1))
    assert third.is_good(third.path(1)) and len(asked) == 1


def test_a_damaged_checkpoint_is_not_trusted_and_asked_for_again(checkpoints: Checkpoints):
    (path,) = add(checkpoints, 1)
    content = (path / NAMES[0]).read_bytes()
    another = Checkpoints(checkpoints.folder, keep=2)
    (path / NAMES[0]).write_bytes(content[::-1])
    assert not another.is_good(path)
    (path / NAMES[0]).write_bytes(content)
    assert another.is_good(path)


def test_the_newest_good_ones_are_kept_and_all_that_is_newer(checkpoints: Checkpoints):
    add(checkpoints, 1, 2, 3, 4, 5)
    for step in (3, 5):
        (checkpoints.path(step) / NAMES[1]).unlink()
    another = Checkpoints(checkpoints.folder, keep=2)
    another.prune()
    assert steps_of(another.all()) == [2, 3, 4, 5]
    (another.path(2) / NAMES[1]).unlink()
    Checkpoints(checkpoints.folder, keep=2).prune()  # only 4 is good: nothing may go
    assert steps_of(another.all()) == [2, 3, 4, 5]


# save: a checkpoint is written. fail: one is begun, and given up. tear: one that is there is damaged, as is found when
# the run starts again. restart: it starts again, remembering nothing.
Happenings = st.lists(st.sampled_from(["save", "save", "fail", "tear", "restart"]), max_size=14)


@settings(max_examples=100)
@given(happenings=Happenings, keep=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_as_many_good_ones_stay_as_are_to_be_kept(happenings: list[str], keep: int, seed: int):
    """However often saving fails, and whatever is torn: what is good and among the newest `keep` good ones stays."""
    draw = random.Random(seed)
    with TemporaryDirectory() as name, patch("os.fsync", lambda descriptor: None):
        checkpoints, torn, step = Checkpoints(Path(name) / "checkpoints", keep=keep), 0, 0
        for happening in happenings:
            before = good_steps(checkpoints.folder)
            match happening:
                case "save":
                    step += 1
                    checkpoints.commit(*partial_folder(checkpoints, step))
                    checkpoints.prune()
                    before.add(step)
                case "fail":
                    shutil.rmtree(partial_folder(checkpoints, step + 1)[0])
                case "tear" if before:
                    victim = draw.choice(sorted(before))
                    draw.choice(TEARS)(checkpoints.path(victim), draw)
                    before.discard(victim)
                    torn += 1
                    checkpoints = Checkpoints(checkpoints.folder, keep=keep)
                case "restart":
                    checkpoints = Checkpoints(checkpoints.folder, keep=keep)
                    checkpoints.clear()
            after = good_steps(checkpoints.folder)
            assert set(sorted(before)[-keep:]) <= after <= before
            assert len(checkpoints.all()) <= keep + torn


@settings(max_examples=60)
@given(happenings=Happenings, keep=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_the_newest_good_one_is_never_removed(happenings: list[str], keep: int, seed: int):
    """Even if what this process has written is damaged behind its back."""
    draw = random.Random(seed)
    with TemporaryDirectory() as name, patch("os.fsync", lambda descriptor: None):
        checkpoints, step = Checkpoints(Path(name) / "checkpoints", keep=keep), 0
        for happening in happenings:
            good = good_steps(checkpoints.folder)
            if happening == "save":
                step += 1
                checkpoints.commit(*partial_folder(checkpoints, step))
                checkpoints.prune()
                assert max(good_steps(checkpoints.folder)) == step
            elif happening == "tear" and good:
                draw.choice(TEARS)(checkpoints.path(draw.choice(sorted(good))), draw)
                good = good_steps(checkpoints.folder)
                checkpoints.prune()
                assert max(good_steps(checkpoints.folder), default=0) == max(good, default=0)


@pytest.mark.parametrize("how", ["full", "death before", "death half-way", "death after"])
def test_a_removal_that_is_cut_off_leaves_nothing_that_is_taken_for_good(checkpoints: Checkpoints, how: Any):
    (path,) = add(checkpoints, 1)
    with Calls(checkpoints.folder) as listed:
        remove(path)
    assert not path.exists() and len(listed.points) == 3
    for point in listed.points:
        add(checkpoints, 1)
        content = {file.name: file.read_bytes() for file in path.iterdir()}
        with Calls(checkpoints.folder, {point: how}) as calls, contextlib.suppress(OSError, Death):
            remove(path)
        assert point in calls.points
        left = checkpoints.all()
        assert all({file.name: file.read_bytes() for file in found.iterdir()} == content for found in left), str(point)
        checkpoints.clear()
        assert not list(checkpoints.folder.glob("*.partial"))
        if left:
            remove(path)


def test_what_is_set_aside_overwrites_nothing_and_is_no_checkpoint(checkpoints: Checkpoints):
    names = []
    for number in range(4):
        (path,) = add(checkpoints, 5)
        (path / "mark").write_text(str(number))
        names.append(checkpoints.set_aside(path, "damaged").name)
    assert names == ["step_0000005.damaged", *(f"step_0000005.damaged-{n}" for n in (2, 3, 4))]
    assert [(checkpoints.folder / name / "mark").read_text() for name in names] == ["0", "1", "2", "3"]
    assert checkpoints.all() == []
    checkpoints.clear()
    assert all((checkpoints.folder / name).is_dir() for name in names)


def test_a_checkpoint_that_was_set_aside_is_not_trusted_when_it_comes_back(checkpoints: Checkpoints):
    (path,) = add(checkpoints, 5)
    aside = checkpoints.set_aside(path, "damaged")
    (aside / NAMES[0]).unlink()
    aside.rename(path)
    assert not checkpoints.is_good(path)


def test_clearing_takes_away_what_was_cut_off_and_nothing_else(checkpoints: Checkpoints, tmp_path: Path):
    add(checkpoints, 1)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    partial_folder(checkpoints, 2)
    (checkpoints.folder / f".latest.{'a' * 32}.partial").touch()
    (checkpoints.folder / "thesis.partial").mkdir()
    (checkpoints.folder / "step_0000003.partial").symlink_to(outside)
    checkpoints.clear()
    assert {path.name for path in checkpoints.folder.iterdir()} == {"step_0000001", "latest", "thesis.partial"}
    assert (outside / "file").exists()
    Checkpoints(tmp_path / "none yet", keep=2).clear()
