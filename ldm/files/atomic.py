"""Files and folders that appear under their names only when whole; what was begun in vain is taken away again."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which becomes `path`, in place of an older file, when the block has ended well."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder`, in place of an older one, when the block has ended well."""
    partial, older = (folder.with_name(folder.name + suffix) for suffix in (".partial", ".older.partial"))
    if older.exists() and not folder.exists():  # the last attempt was cut off between its two renamings
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
