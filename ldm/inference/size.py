"""The size of a drawing: what was asked for, that of the picture it starts from, or the model's own. Sizes in messages
are width x height. Does not import torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ldm.model.facts import ModelFacts

if TYPE_CHECKING:
    from PIL import Image

MAX_SIDE = 4096  # pixels
FAR = 4  # a picture with this many times the model's pixels, or less than 1 in as many, is scaled


def size_of(
    image: Image.Image | None, height: int | None, width: int | None, facts: ModelFacts, *,
    remark: Callable[[str], None],
) -> tuple[int | None, int | None]:  # fmt: skip
    """Return height and width: the given ones, those of the picture, or the model's; None where nothing is known.

    A picture's sides are rounded down to multiples of the model's factor. It is scaled to a side that is given, and to
    the model's own number of pixels if it has many more or many fewer. remark: called with what is not as it was asked.
    Raises ValueError for a side that is no multiple of the factor, or too long.
    """
    if facts.factor is None:
        return height, width
    if image is None:
        height, width = height or facts.native_size, width or facts.native_size
    for name, side in (("height", height), ("width", width)):
        if side is not None and side % facts.factor:
            lower = side // facts.factor * facts.factor
            near = " or ".join(str(multiple) for multiple in (lower, lower + facts.factor) if multiple)
            raise ValueError(f"{name} is {side}, expected a multiple of {facts.factor}: use {near}")
    if image is None:
        return height, width
    if height and width:
        _say_if_stretched(image, height, width, facts.factor, remark)
        return height, width
    return _like_picture(image, height, width, facts, remark)


def _like_picture(
    image: Image.Image, height: int | None, width: int | None, facts: ModelFacts, remark: Callable[[str], None]
) -> tuple[int, int]:
    """Return height and width with the picture's proportions, of which one may be given."""
    factor, own = facts.factor or 1, facts.native_size
    has, pixels = f"the picture has {image.width} x {image.height} pixels", image.width * image.height
    is_far = own is not None and not own**2 / FAR <= pixels <= own**2 * FAR
    scale = 1.0
    if height or width:
        scale = height / image.height if height else (width or 1) / image.width
    elif own is not None and is_far:
        scale = own / math.sqrt(pixels)
    to_multiple = math.floor if scale == 1 else round
    found = [max(to_multiple(side * scale / factor), 1) * factor for side in (image.height, image.width)]
    height, width = height or found[0], width or found[1]
    if max(height, width) > MAX_SIDE:
        raise ValueError(
            f"{has} and would be drawn at {width} x {height}, expected at most {MAX_SIDE} a side: crop it, or give "
            "height and width (--H and --W)"
        )
    if scale != 1 and is_far:
        remark(
            f"{has}, far from the {own} x {own} of {facts.name}: it is scaled to {width} x {height}; height and width "
            "(--H and --W) choose another size"
        )
    elif scale == 1 and (width, height) != image.size:
        remark(f"{has}, and sides must be multiples of {factor}: it is scaled to {width} x {height}")
    return height, width


def _say_if_stretched(image: Image.Image, height: int, width: int, factor: int, remark: Callable[[str], None]) -> None:
    """Remark if height and width do not have the picture's proportions, but for rounding to multiples of the factor."""
    other_width, other_height = image.width * height / image.height, image.height * width / image.width
    if abs(width - other_width) >= factor and abs(height - other_height) >= factor:
        remark(
            f"the picture has {image.width} x {image.height} pixels, and is stretched to the {width} x {height} that "
            "were asked for"
        )
