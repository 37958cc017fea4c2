"""Pixels -> pictures, and many pictures -> one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldm.files.atomic import atomic_file

GAP = 2  # pixels between pictures
LABEL_LINES, LINE_HEIGHT = 2, 11


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels B x 3 x H x W in [-1, 1] (clamped) -> B RGB images."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in scaled.permute(0, 2, 3, 1).cpu()]


def sheet(images: Sequence[Image.Image], *, columns: int, labels: Sequence[str] = (), zoom: int = 1) -> Image.Image:
    """Images of one size, row by row. Labels stand below: one for each image, or one for each row or part of a row,
    in two lines at most and cut to the width of the images that they belong to."""
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
    """The text's words in lines of at most `width` pixels; a longer word is cut."""
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
    """Write a PNG that appears under its name only when whole."""
    with atomic_file(path) as partial:
        image.save(partial, format="PNG")
