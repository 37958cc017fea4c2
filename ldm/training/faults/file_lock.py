"""A folder that one process at a time works in, on whichever machines."""

from __future__ import annotations

import os
import socket
from pathlib import Path

LOCK = ".lock"  # a file and not the folder: on NFS what is locked must be open for writing


class Taken(Exception):
    """Another process works in a folder; says which."""


def lock_folder(folder: Path) -> int:
    """Keep a folder until this process ends, however it ends, or the descriptor that is returned is closed.

    Raises Taken, or OSError where the file system knows no locks.
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
