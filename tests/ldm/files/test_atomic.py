"""Files and folders that appear whole or not at all, and leave nothing behind."""

from pathlib import Path

import pytest

from ldm.files.atomic import whole_file, whole_folder


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path):
    path = tmp_path / "file.txt"
    for text in ("one", "two"):
        with whole_file(path) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("thr")
        raise KeyboardInterrupt
    assert path.read_text() == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


def fill(folder: Path, text: str) -> None:
    with whole_folder(folder) as whole:
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
