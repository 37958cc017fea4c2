"""File systems on which writing really fails: full, read-only, or without rights; skipped where they cannot be made."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


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


def remount_read_only(disk: Path) -> None:
    _mount("-o", "remount,ro", str(disk))


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
