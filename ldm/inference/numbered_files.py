"""Write numbered files that never replace others."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ldm.files.atomic import write_new


class NumberedFiles:
    """New PNG files in a folder, numbered from the highest existing one: 00000.png, grid-0000.png."""

    def __init__(self, folder: Path, *, prefix: str = "", digits: int) -> None:
        self.folder, self.prefix, self.digits = folder, prefix, digits
        name = re.compile(re.escape(prefix) + r"(\d+)\.png")
        entries = folder.iterdir() if folder.is_dir() else ()
        taken = [int(match[1]) for entry in entries if (match := name.fullmatch(entry.name))]
        self.next = max(taken, default=-1) + 1

    def write(self, content: bytes) -> Path:
        """Write a complete file under the next free name; never replace one, whoever wrote it.

        The folder is created with the first file, so that a drawing that fails leaves none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = self.folder / f"{self.prefix}{self.next:0{self.digits}d}.png"
            self.next += 1
            try:
                write_new(path, content)
                return path
            except FileExistsError:  # another process took this name
                continue


def check_folder(folder: Path) -> None:
    """Raise OSError or ValueError if the folder cannot be created or written to; does not create it."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise ValueError(f"pictures cannot be written to {folder}: {nearest} is not a folder; choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"pictures cannot be written to {folder}: no permission to write to {nearest}; choose another"
        )
