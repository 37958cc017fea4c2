"""Report a failed write as one kind of OSError that names the path asked for, whichever library wrote."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IN_RUST = re.compile(r"\(os error (\d+)\)")  # in the text of safetensors' own class of errors
ELSEWHERE = "write elsewhere"
REMEDIES = {
    errno.ENOSPC: f"free disk space, or {ELSEWHERE}",
    errno.EDQUOT: f"free disk space within your quota, or {ELSEWHERE}",
    errno.EFBIG: f"{ELSEWHERE}, where files may be as large",
    errno.EROFS: f"{ELSEWHERE}, or mount the file system for writing",
    errno.EACCES: f"{ELSEWHERE}, or change the permissions",
    errno.EPERM: f"{ELSEWHERE}, or change the permissions",
    errno.EIO: f"check the disk, or {ELSEWHERE}",
    errno.ENOENT: f"create its folder, or {ELSEWHERE}",
}


class WriteError(OSError):
    """A file or folder cannot be written; the message says which, why, and what to do."""

    def __str__(self) -> str:
        return f"{self.filename} cannot be written ({self.strerror}): {REMEDIES[self.errno or 0]}"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context manager: raise WriteError, which names `path`, for a write inside that fails.

    Libraries in Rust raise errors of their own, and temporary names mean nothing to a user. Other errors pass.
    """
    try:
        yield
    except Exception as error:
        number = _system_error(error)
        if number not in REMEDIES:
            raise
        raise WriteError(number, os.strerror(number), str(path)) from error


def _system_error(error: Exception) -> int | None:
    """Return the number of the system's error that this one stands for; None if it stands for none."""
    if isinstance(error, OSError):
        return error.errno
    found = IN_RUST.search(str(error))
    return int(found[1]) if found else None
