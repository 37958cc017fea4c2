"""Files and folders that appear whole or not at all, and leave nothing behind."""

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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


def killed(work: Callable[[], None]) -> None:
    """Do something in a process that ends where it calls os._exit(9), as if it had been killed."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("renamings", [0, 1, 2, 3])
def test_a_writer_that_is_killed_leaves_the_older_folder_and_nothing_for_long(tmp_path: Path, renamings: int):
    """While it writes, or after each of its renamings: to a folder that is not empty, of the older one, of the new."""
    rename = Path.rename

    def cut_off() -> None:
        left = iter(range(renamings - 1))

        def counted(self: Path, target: Any) -> Path:
            if renamings and next(left, None) is None:
                with contextlib.suppress(OSError):
                    rename(self, target)
                os._exit(9)
            return rename(self, target)

        Path.rename = counted
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "first.txt").write_text("two")
            (folder / "second.txt").write_text("two")
            if not renamings:
                os._exit(9)

    fill(tmp_path / "model", "one")
    killed(cut_off)
    assert [path.suffix for path in tmp_path.iterdir() if path.name != "model"] == [".partial"]
    with pytest.raises(OSError, match="full"):
        fill(tmp_path / "model", "fault")
    assert (tmp_path / "model" / "second.txt").read_text() == ("two" if renamings == 3 else "one")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_two_writers_of_one_folder_do_not_disturb_each_other(tmp_path: Path):
    """Each has a folder of its own; whoever is the last to complete its own is what remains."""
    folder = tmp_path / "model"
    with atomic_folder(folder) as first:
        (first / "first.txt").write_text("one")
        with atomic_folder(folder) as second:
            (second / "first.txt").write_text("two")
            assert (first / "first.txt").read_text() == "one"
        assert (folder / "first.txt").read_text() == "two"
        (first / "second.txt").write_text("one")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"first.txt": "one", "second.txt": "one"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_many_writers_of_one_folder_leave_one_complete_folder(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: fill(tmp_path / "model", f"{number}"), range(200)))
    found = [path.read_text() for path in (tmp_path / "model").iterdir()]
    assert len(found) == 2 and len(set(found)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_folder_is_open_to_whom_the_umask_allows(tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        fill(tmp_path / "model", "one")
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_folder_is_written_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ldm.files.atomic.lock_folder", refuse)
    for text in ("one", "two"):
        fill(tmp_path / "model", text)
        assert (tmp_path / "model" / "second.txt").read_text() == text
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


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
