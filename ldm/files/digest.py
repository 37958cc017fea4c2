"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

SHORT = 10  # hex digits, as in A1111


def sha256_of(path: Path) -> str:
    """Hash a file with SHA-256; returns 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def short_hash(files: Iterable[Path]) -> str:
    """Hash the concatenated files to 10 hex digits of their SHA-256: A1111's short hash."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:SHORT]
