"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

SHORT = 10  # hex digits, as A1111 shows them


def sha256_of(path: Path) -> str:
    """A file's SHA-256, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_hash(files: Iterable[Path]) -> str:
    """The first 10 hex digits of the SHA-256 of these files' bytes, one file after another: A1111's short hash."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:SHORT]
