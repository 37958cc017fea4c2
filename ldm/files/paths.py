"""Paths as people write them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

KINDS_SHOWN = 4


def user_path(text: str | os.PathLike[str]) -> Path:
    """Make a path of what a user wrote: ~ and ~NAME at its beginning are home folders, as in a shell; ./~ is a name.

    Raises ValueError for a user without a home folder.
    """
    if str(text).startswith("./~"):
        return Path(text).absolute()  # Path drops the ./
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{text}: there is no home folder of that name: write the full path, or ./{text}") from error


def contents(folder: Path) -> str:
    """Count what a folder holds, by ending: "2 folders, 949 .png, 949 .txt"."""
    entries = list(folder.iterdir())
    folders = sum(entry.is_dir() for entry in entries)
    kinds = Counter(entry.suffix.lower() or "without an ending" for entry in entries if not entry.is_dir())
    listed = [f"{folders:,} folder{'s' * (folders > 1)}"] * (folders > 0)
    listed += [f"{count:,} {kind}" for kind, count in kinds.most_common(KINDS_SHOWN)]
    return (", ".join(listed) + ", ..." * (len(kinds) > KINDS_SHOWN)) or "nothing"
