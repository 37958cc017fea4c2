"""Lock a folder, so that only one process at a time works in it, on any machine that shares it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

LOCK = ".lock"  # not the folder itself: NFS locks only what is open for writing


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
