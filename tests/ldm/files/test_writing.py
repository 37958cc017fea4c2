"""A write that fails is one kind of error with a remedy, on file systems that are really full, read-only or closed."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from helpers.disks import (
    cut_power,
    limited_files,
    remount_read_only,
    restore_power,
    slow_disk,
    small_disk,
    without_rights,
)

from ldm.errors import exit_code
from ldm.files.atomic import atomic_file, atomic_folder, to_disk, write_atomically, write_new
from ldm.files.writing import WriteError, writing
from ldm.interop.fragments import write_fragments
from ldm.interop.network_files import write_weights

LARGE = {"weight": torch.zeros(2**20)}  # 4 MiB


def by_safetensors(path: Path) -> None:
    write_weights(LARGE, path)


def as_fragments(path: Path) -> None:
    write_fragments(path, LARGE, {})


def in_a_folder(path: Path) -> None:
    with atomic_folder(path) as folder:
        write_weights(LARGE, folder / "weights.safetensors")


WRITERS = {
    "safetensors": by_safetensors,
    "fragments": as_fragments,
    "folder": in_a_folder,
    "file": lambda path: write_atomically(path, bytes(2**22)),
    "new file": lambda path: write_new(path, bytes(2**22)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_error_that_names_the_path_and_what_to_do(writer: str):
    with small_disk("2M") as disk:
        with pytest.raises(WriteError) as caught:
            WRITERS[writer](disk / "out")
        assert str(caught.value) == (
            f"{disk / 'out'} cannot be written (No space left on device): free disk space, or write elsewhere"
        )
        assert (caught.value.errno, exit_code(caught.value)) == (errno.ENOSPC, 2)
        assert list(disk.iterdir()) == []  # what was begun is removed: it would keep the disk full
        (disk / "remedy").write_bytes(bytes(2**20))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_read_only_file_system(writer: str):
    with small_disk("16M") as disk:
        remount_read_only(disk)
        with pytest.raises(
            WriteError, match=r"out cannot be written \(Read-only file system\): write elsewhere, or mou"
        ):
            WRITERS[writer](disk / "out")


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_without_rights(writer: str):
    with small_disk("16M") as disk:
        (disk / "closed").mkdir(mode=0o555)
        with (
            without_rights(),
            pytest.raises(WriteError, match=r"out cannot be written \(Permission denied\): write els"),
        ):
            WRITERS[writer](disk / "closed" / "out")
        WRITERS[writer](disk / "out")  # the remedy


@pytest.mark.parametrize("writer", WRITERS)
def test_a_limit_of_the_size_of_files(writer: str, tmp_path: Path):
    with limited_files(2**20), pytest.raises(WriteError, match=r"out cannot be written \(File too large\): .*as large"):
        WRITERS[writer](tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_quota_has_a_remedy_of_its_own(tmp_path: Path):
    with pytest.raises(WriteError, match="free disk space within your quota"), writing(tmp_path / "out"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "fragments"])  # their writer flushes them
def test_what_has_its_name_when_the_power_fails_has_its_content(writer: str, tmp_path: Path):
    WRITERS[writer](tmp_path / "out")
    expected = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with slow_disk() as disk:
        WRITERS[writer](disk / "out")
        (disk / "another").touch()
        to_disk(disk / "another")  # and with it all names, but not what files hold
        cut_power(disk)
        restore_power(disk)
        assert {path: (disk / path).read_bytes() for path in expected} == expected


def test_a_folder_that_vanishes_while_a_file_is_written(tmp_path: Path):
    (tmp_path / "there").mkdir()
    with (
        pytest.raises(
            WriteError, match=r"there/out cannot be written \(No such file or directory\): create its folder"
        ),
        atomic_file(tmp_path / "there" / "out") as partial,
    ):
        partial.unlink()
        (tmp_path / "there").rmdir()


def test_other_errors_pass(tmp_path: Path):
    for error in (
        ValueError("no"),
        ConnectionRefusedError(errno.ECONNREFUSED, "no"),
        TimeoutError("no"),
        KeyError("x"),
    ):
        with pytest.raises(type(error)) as caught, writing(tmp_path):
            raise error
        assert caught.value is error
