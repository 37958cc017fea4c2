"""Write to a temporary path and, once all of it is on the disk, rename it into place; on failure, remove it.

Also lock a folder, so that only one process at a time works in it, on any machine that shares it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ldm.files.writing import writing

PARTIAL = ".partial"  # suffix of files and folders being written
LOCK = ".lock"  # not the folder itself: NFS locks only what is open for writing
NEW, OLDER = "new", "older"  # in a folder of its own that each writer of a folder has


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success it replaces `path`, with the permissions of the umask.

    A link is replaced, not what it leads to. Raises WriteError, naming `path`, for a full disk and the like.
    """
    with writing(path):
        partial = temporary(path)
        try:
            partial.touch()
            mode = partial.stat().st_mode & 0o777
            yield partial
            partial.chmod(mode)  # a library may have replaced the file with other permissions
            to_disk(partial)  # or, without power, the name could be there before the content
            partial.replace(path)
        finally:
            with suppress(OSError):  # what failed before is the error to report
                partial.unlink()


def temporary(path: Path) -> Path:
    """Return a name next to `path` that nobody else has."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")


def is_temporary(name: str, of: str) -> bool:
    """Return whether this is a name that `temporary` gave to a file or folder named `of`."""
    return re.fullmatch(rf"\.{re.escape(of)}\.[0-9a-f]{{32}}{re.escape(PARTIAL)}", name) is not None


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder to fill; on success it replaces `folder`. Of several writers, the last one's remains.

    It lies in a folder that no other writer uses, locked while it is in use: leftovers of killed writers are removed.
    A link stays, and its target is replaced. Raises WriteError, naming `folder`, for a full disk and the like.
    """
    with writing(folder):
        target = folder.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(target) as own:
            (own / NEW).mkdir()
            yield own / NEW
            for path in (*(own / NEW).rglob("*"), own / NEW):
                to_disk(path)
            _replace(target, own)


@contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder next to `folder` for one of its writers, locked while it is in use, and removed then."""
    _discard_leftovers(folder)
    own = temporary(folder)
    with ExitStack() as stack:
        own.mkdir(mode=0o700)
        with suppress(OSError):  # without locks, only its own writer removes it
            stack.callback(os.close, lock_folder(own))
        try:
            yield own
        finally:
            _discard(own, folder)


def _discard_leftovers(folder: Path) -> None:
    """Remove what killed writers of this folder left: names that only this program gives, locked by nobody."""
    for leftover in folder.parent.iterdir():
        if not is_temporary(leftover.name, folder.name) or leftover.is_symlink():
            continue
        if (leftover / NEW).exists() or (leftover / OLDER).exists():  # before, its writer may not have locked it yet
            with suppress(Taken, OSError), ExitStack() as stack:  # it is in use, or the file system has no locks
                stack.callback(os.close, lock_folder(leftover))
                _discard(leftover, folder)


def _replace(folder: Path, own: Path) -> None:
    """Rename OWN/new to `folder`, whose older content goes to OWN/older. Another writer may do the same meanwhile."""
    while True:
        try:
            (own / NEW).rename(folder)
            return
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        shutil.rmtree(own / OLDER, ignore_errors=True)
        with suppress(FileNotFoundError):
            folder.rename(own / OLDER)


def _discard(own: Path, folder: Path) -> None:
    """Remove a writer's own folder. If it was interrupted between its two renames, first put the older content back."""
    if not folder.exists():
        with suppress(OSError):  # there is none, or another writer has just completed its own
            (own / OLDER).rename(folder)
    shutil.rmtree(own, ignore_errors=True)


def write_atomically(path: Path, content: bytes) -> None:
    with atomic_file(path) as partial:
        partial.write_bytes(content)


def write_new(path: Path, content: bytes) -> None:
    """Write a file that is not there yet. Raises FileExistsError if the name is taken: never replaces a file."""
    partial = temporary(path)
    with writing(path):
        try:
            with partial.open("xb") as file:
                file.write(content)
            to_disk(partial)
            _link(partial, path)
        finally:
            with suppress(OSError):  # what failed before is the error to report
                partial.unlink()


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


class Taken(Exception):
    """Another process holds the lock of a folder; the message names it."""


def lock_folder(folder: Path) -> int:
    """Lock a folder until this process ends, in whatever way, or the returned descriptor is closed.

    Raises Taken if it is locked, or OSError if the file system does not support locks.
    """
    import fcntl

    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = os.read(lock, 200).decode(errors="replace").strip()
        os.close(lock)
        raise Taken(owner or "another process") from error
    except OSError:
        os.close(lock)
        raise
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return lock
