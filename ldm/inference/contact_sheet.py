"""Convert pixels to images, and combine images into contact sheets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.files.atomic import atomic_file
from ldm.inference.pictures import NumberedFiles
from ldm.inference.recipe import Drawing, png_bytes

GAP = 2  # pixels between pictures
LABEL_LINES, LINE_HEIGHT = 2, 11
MAX_SHEET_PIXELS = 2**25  # Pillow warns of a decompression bomb at 2.7 times as many


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Convert pixels B x 3 x H x W in [-1, 1] (clamped) to B RGB images."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in scaled.permute(0, 2, 3, 1).cpu()]


def sheet(images: Sequence[Image.Image], *, columns: int, labels: Sequence[str] = (), zoom: int = 1) -> Image.Image:
    """Arrange images of one size in rows. Labels are below, one per image, or one per row or part of a row: at most two
    lines, cut to the width of their images."""
    width, height = images[0].width * zoom, images[0].height * zoom
    label_height = LABEL_LINES * LINE_HEIGHT if labels else 0
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + label_height + GAP) + GAP), "#d0d0d0")
    draw = ImageDraw.Draw(canvas)
    span = len(images) // len(labels) if labels else 0  # images that share a label
    for place, image in enumerate(images):
        left = GAP + place % columns * (width + GAP)
        top = GAP + place // columns * (height + label_height + GAP)
        canvas.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if span and place % span == 0:
            lines = wrapped(draw, labels[place // span], span * (width + GAP) - GAP)
            for number, line in enumerate(lines[:LABEL_LINES]):
                draw.text((left, top + height + number * LINE_HEIGHT), line, fill="black", font=_font())
    return canvas


def wrapped(draw: ImageDraw.ImageDraw, text: str, width: int) -> list[str]:
    """Wrap the text's words in lines of at most `width` pixels; a longer word is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=_font()) <= width:
            lines[-1] = longer
            continue
        while draw.textlength(word, font=_font()) > width:
            word = word[:-1]
        lines = [*lines, word] if lines[-1] else [word]
    return lines


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=9)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG atomically."""
    with atomic_file(path) as partial:
        image.save(partial, format="PNG")


class Sheet:
    """Rows of drawings in one file, or in several if their size changes or the file would become too large."""

    def __init__(self, files: NumberedFiles, *, columns: int) -> None:
        self.files, self.columns = files, columns
        self.drawings: list[Drawing] = []

    def add(self, drawings: Sequence[Drawing]) -> Path | None:
        """Add drawings of one size. Return the file of the previous ones if it had to be written first."""
        size = drawings[0].image.size
        pixels = size[0] * size[1] * (len(self.drawings) + len(drawings))
        full = bool(self.drawings) and (self.drawings[0].image.size != size or pixels > MAX_SHEET_PIXELS)
        older, self.drawings = (self.drawings, list(drawings)) if full else ([], self.drawings + list(drawings))
        return self._write(older) if full else None

    def write(self) -> Path:
        """Write the drawings added since the last write; there must be some."""
        drawings, self.drawings = self.drawings, []
        return self._write(drawings)

    def _write(self, drawings: Sequence[Drawing]) -> Path:
        images, recipes = zip(*drawings, strict=True)
        picture = sheet(images, columns=min(self.columns, len(images)))
        return self.files.write(png_bytes(picture, recipes))
