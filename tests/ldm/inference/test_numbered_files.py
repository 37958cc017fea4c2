"""Files that are whole and replace none."""

import multiprocessing
import os
import resource

import pytest

from ldm.inference.pictures import NumberedFiles


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_numbers_go_on_from_the_highest(tmp_path):
    (tmp_path / "grid-0007.png").touch()
    (tmp_path / "12345678.png").touch()
    (tmp_path / "90000000.jpg").touch()
    assert [NumberedFiles(tmp_path, digits=5).write(b"x").name for _ in range(2)] == ["12345679.png", "12345680.png"]
    grids = NumberedFiles(tmp_path, prefix="grid-", digits=4)
    assert [grids.write(b"x").name for _ in range(2)] == ["grid-0008.png", "grid-0009.png"]
    fresh = NumberedFiles(tmp_path / "new" / "folder", digits=5)
    assert fresh.write(b"x") == tmp_path / "new" / "folder" / "00000.png"


def no_link(*_):
    raise PermissionError(1, "Operation not permitted")


@pytest.fixture(params=["hard links", "no hard links"])
def links(request, monkeypatch):
    if request.param == "no hard links":
        monkeypatch.setattr(os, "link", no_link)


def test_taken_names_are_kept_even_dangling_links(tmp_path, links):
    files = NumberedFiles(tmp_path, digits=5)
    (tmp_path / "00000.png").write_bytes(b"other")
    (tmp_path / "00001.png").symlink_to(tmp_path / "elsewhere")
    assert files.write(b"mine") == tmp_path / "00002.png"
    assert (tmp_path / "00000.png").read_bytes() == b"other"
    assert (tmp_path / "00002.png").read_bytes() == b"mine"
    assert names(tmp_path) == ["00000.png", "00001.png", "00002.png"]


def write_many(folder, content: bytes) -> None:
    files = NumberedFiles(folder, digits=5)
    for _ in range(60):
        files.write(content)


def test_two_processes_write_to_one_folder(tmp_path, links):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(tmp_path, letter * 5000)) for letter in (b"a", b"b")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    contents = [(tmp_path / name).read_bytes() for name in names(tmp_path)]
    assert names(tmp_path) == [f"{number:05d}.png" for number in range(120)]
    assert contents.count(b"a" * 5000) == contents.count(b"b" * 5000) == 60


def test_a_write_cut_short_leaves_nothing(tmp_path, monkeypatch):
    files = NumberedFiles(tmp_path, digits=5)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # as a full disk: the write stops in its midst
    try:
        with pytest.raises(OSError, match="File too large"):
            files.write(b"x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "link", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write(b"x")
    assert names(tmp_path) == []
    monkeypatch.undo()
    assert files.write(b"x").read_bytes() == b"x"


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "usual").touch()
    path = NumberedFiles(tmp_path, digits=5).write(b"x")
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode
