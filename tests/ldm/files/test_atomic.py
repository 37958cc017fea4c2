"""Files and folders that appear whole or not at all, and leave nothing behind."""

import os
from pathlib import Path

import pytest

from ldm.files.atomic import atomic_file, atomic_folder, write_new


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "file.txt"
    for text in ("one", "two"):
        with atomic_file(path) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as partial:
        partial.write_text("thr")
        raise KeyboardInterrupt
    assert path.read_text() == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def fill(folder: Path, text: str) -> None:
    with atomic_folder(folder) as whole:
        (whole / "first.txt").write_text(text)
        if text == "fault":
            raise OSError("the disk is full")
        (whole / "second.txt").write_text(text)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    folder = tmp_path / "deep" / "model"
    with pytest.raises(OSError, match="full"):
        fill(folder, "fault")
    assert not list(folder.parent.iterdir())
    fill(folder, "one")
    with pytest.raises(OSError, match="full"):
        fill(folder, "fault")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"first.txt": "one", "second.txt": "one"}
    (folder / "of_the_older.txt").touch()
    fill(folder, "two")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"first.txt": "two", "second.txt": "two"}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_folder_cut_off_between_its_renamings_comes_back(tmp_path: Path):
    fill(tmp_path / "model", "one")
    (tmp_path / "model").rename(tmp_path / "model.older.partial")
    with pytest.raises(OSError, match="full"):
        fill(tmp_path / "model", "fault")
    assert (tmp_path / "model" / "second.txt").read_text() == "one"


def test_nobody_elses_file_is_touched(tmp_path: Path):
    other = tmp_path / "file.txt.partial"
    other.write_text("mine")
    with atomic_file(tmp_path / "file.txt") as partial:
        partial.write_text("one")
    assert other.read_text() == "mine"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_is_readable_by_whom_the_umask_allows(tmp_path: Path, umask: int):
    """Whatever a library makes of its mode: safetensors writes files that their owner alone may read."""
    before = os.umask(umask)
    try:
        with atomic_file(tmp_path / "file") as partial:
            partial.unlink()
            partial.write_text("of a library")
            partial.chmod(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_never_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool):
    if not links:
        monkeypatch.setattr("os.link", refuse)
    paths = [tmp_path / name for name in "abc"]
    paths[0].write_text("there before")
    write_new(paths[1], b"new")
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["there before", "new"]
    paths[2].write_text("taken too")
    for path in paths:
        with pytest.raises(FileExistsError):
            write_new(path, b"newer")
    assert [path.read_text() for path in paths] == ["there before", "new", "taken too"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def refuse(*_: object) -> None:
    raise OSError("no hard links here")
