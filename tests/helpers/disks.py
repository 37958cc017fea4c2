"""File systems on which writing really fails or waits: full, read-only, without rights, or stalled for a while.

Tests are skipped where these cannot be made.
"""

from __future__ import annotations

import fcntl
import os
import resource
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

NOBODY = 65534
# The kernel's EXT4_IOC_SHUTDOWN, and EXT4_GOING_FLAGS_NOLOGFLUSH (fs/ext4/ext4.h).
SHUTDOWN, WITHOUT_JOURNAL = 0x8004587D, 2


def _mount(*words: str) -> None:
    try:
        done = subprocess.run(["mount", *words], capture_output=True, text=True, timeout=30)
    except OSError as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")


@contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """A folder on a file system of its own, of this size (tmpfs's, as "8M")."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="small-disk-")))
        folder.chmod(0o755)
        disk = folder / "disk"
        disk.mkdir()
        _mount("-t", "tmpfs", "-o", f"size={size},mode=755", "tmpfs", str(disk))
        stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
        yield disk


IMAGE = "image"  # of a disk, in the folder where it is mounted


def mounted(image: Path, disk: Path) -> None:
    """Mount a file that holds a file system."""
    _mount("-o", "loop", str(image), str(disk))


@contextmanager
def slow_disk(mebibytes: int = 64) -> Iterator[Path]:
    """A folder on an ext4 of its own, for `stall` and `cut_power`."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slow-disk-")))
        image, disk = folder / IMAGE, folder / "disk"
        disk.mkdir()
        with image.open("wb") as file:
            file.truncate(mebibytes << 20)
        try:
            subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, capture_output=True, timeout=30)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no ext4 can be made here: {error}")
        mounted(image, disk)
        stack.callback(subprocess.run, ["umount", "--lazy", str(disk)], check=True)
        yield disk


def stall(disk: Path, seconds: float) -> None:
    """Let everything that writes to a slow_disk wait, as an overloaded server of files does."""
    words = f"fsfreeze --freeze '{disk}' && sleep {seconds}; fsfreeze --unfreeze '{disk}'"
    # A process of its own, in a session of its own, so that the disk moves again whatever becomes of this one.
    subprocess.run(["sh", "-c", words], check=True, start_new_session=True, timeout=60 + seconds)


def cut_power(disk: Path) -> None:
    """Let a slow_disk lose what is not on it yet, and let all that reads or writes there fail from now on."""
    place = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(place, SHUTDOWN, struct.pack("I", WITHOUT_JOURNAL))
    finally:
        os.close(place)


def restore_power(disk: Path) -> None:
    """Mount it again."""
    subprocess.run(["umount", str(disk)], check=True)
    mounted(disk.with_name(IMAGE), disk)


def remount_read_only(disk: Path) -> None:
    _mount("-o", "remount,ro", str(disk))


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Let this process write no file beyond a size, as shells (ulimit -f) and batch systems do."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def without_rights() -> Iterator[None]:
    """Have the rights of an ordinary user for a while: root may write to folders without any."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
