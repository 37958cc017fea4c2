"""Write to a temporary path and rename it into place on success; on failure, remove what was written."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # suffix of files and folders being written


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success it replaces `path`, with the permissions of the umask."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")  # unique among processes
    try:
        partial.touch()
        mode = partial.stat().st_mode & 0o777
        yield partial
        partial.chmod(mode)  # a library may have replaced the file with other permissions
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill; on success it replaces `folder`."""
    partial, older = (folder.with_name(folder.name + suffix) for suffix in (PARTIAL, f".older{PARTIAL}"))
    if older.exists() and not folder.exists():  # the last attempt was interrupted between its two renames
        older.rename(folder)
    for leftover in (partial, older):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rename(older)
        partial.rename(folder)
    finally:
        for leftover in (partial, older):
            shutil.rmtree(leftover, ignore_errors=True)


def write_atomically(path: Path, content: bytes) -> None:
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet. Raises FileExistsError if the name is taken: never replaces a file."""
    partial = path.with_name(f".{uuid.uuid4().hex}{PARTIAL}")
    try:
        with partial.open("xb") as file:
            file.write(content)
        _link(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> None:
    """Rename a complete file. Raises FileExistsError if the name is taken."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # FAT and some network drives lack hard links: there the file is empty for an instant
        path.open("xb").close()
        partial.replace(path)


def to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's list of files, from the system's cache to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
