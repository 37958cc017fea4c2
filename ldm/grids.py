"""Pixels -> pictures, and many pictures -> one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

GAP = 2  # pixels between pictures
LABEL_HEIGHT = 11


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Pixels B x 3 x H x W in [-1, 1] (clamped) -> B RGB images."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in scaled.permute(0, 2, 3, 1).cpu()]


def sheet(images: Sequence[Image.Image], *, columns: int, labels: Sequence[str] = (), zoom: int = 1) -> Image.Image:
    """Images of one size, row by row; a label, if given, stands below each, cut to its width."""
    width, height = images[0].width * zoom, images[0].height * zoom
    label_height = LABEL_HEIGHT if labels else 0
    rows = -(-len(images) // columns)
    canvas = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + label_height + GAP) + GAP), "#d0d0d0")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=9)
    for place, image in enumerate(images):
        left = GAP + place % columns * (width + GAP)
        top = GAP + place // columns * (height + label_height + GAP)
        canvas.paste(image.resize((width, height), Image.Resampling.NEAREST), (left, top))
        if labels:
            text = labels[place]
            while text and draw.textlength(text, font=font) > width:
                text = text[:-1]
            draw.text((left, top + height), text, fill="black", font=font)
    return canvas


def save_image(image: Image.Image, path: Path) -> None:
    """Write a PNG that appears under its name only when whole."""
    partial = path.with_name(path.name + ".partial")
    image.save(partial, format="PNG")
    partial.replace(path)
