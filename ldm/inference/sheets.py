"""Sheets of drawings, in files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ldm.inference.contact_sheet import sheet
from ldm.inference.metadata import png_bytes
from ldm.inference.numbered_files import NumberedFiles
from ldm.inference.recipe import Drawing

MAX_SHEET_PIXELS = 2**25  # Pillow suspects a bomb in pictures of 2.7 times as many


class Sheet:
    """Rows of drawings that become one file, or several where their size changes or the file would grow too large."""

    def __init__(self, files: NumberedFiles, *, columns: int) -> None:
        self.files, self.columns = files, columns
        self.drawings: list[Drawing] = []

    def add(self, drawings: Sequence[Drawing]) -> Path | None:
        """Add drawings of one size. Returns the file of what was there before, if that had to be written."""
        size = drawings[0].image.size
        pixels = size[0] * size[1] * (len(self.drawings) + len(drawings))
        full = bool(self.drawings) and (self.drawings[0].image.size != size or pixels > MAX_SHEET_PIXELS)
        path = self.write() if full else None
        self.drawings += drawings
        return path

    def write(self) -> Path:
        """Write what was added since the last time, which must be something."""
        images, recipes = zip(*self.drawings, strict=True)
        picture = sheet(images, columns=min(self.columns, len(images)))
        self.drawings = []
        return self.files.write(png_bytes(picture, recipes))
