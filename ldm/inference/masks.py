"""What an inpainting mask keeps: the original's own pixels, pasted over what was drawn.

H x W pixels. White (1) in a mask is repainted, black (0) is kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor

GREY, MUCH = (64, 192), 0.05  # levels that are neither black nor white, and the fraction of them that is remarked
LOST = 0.5  # fraction of the white pixels that is lost between the model's cells, above which it is remarked
STRETCH = 0.02  # relative difference of proportions


def levels_of(mask: Image.Image) -> Image.Image:
    """Return luminance times alpha of an RGB or RGBA image, as L."""
    grey = mask.convert("L")
    return ImageChops.multiply(grey, mask.getchannel("A")) if mask.mode == "RGBA" else grey


def read_mask(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """Convert an RGB or RGBA image to 1 x 1 x H x W of 0 and 1: 1 where luminance times alpha is at least 128 of 255.

    size: height x width, to which it is resized.
    """
    grey, (height, width) = levels_of(mask), size
    if grey.size != (width, height):
        grey = grey.resize((width, height), Image.Resampling.LANCZOS)
    return (torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8) >= 128).float().view(1, 1, height, width)


def softened(mask: Tensor, edge: int) -> Tensor:
    """Let a mask 1 x 1 x H x W rise from 0 to 1 over `edge` pixels within its white part; the black part stays 0.

    A white pixel whose distance to the black part is d pixels (of the larger of rows and columns) gets d / (edge + 1),
    at most 1.
    """
    black, total = 1 - mask, mask
    for _ in range(edge):
        black = F.max_pool2d(black, 3, stride=1, padding=1)
        total = total + (1 - black)
    return total / (edge + 1)


def pasted(drawn: Tensor, original: Tensor, mask: Tensor | None, edge: int = 0) -> Tensor:
    """Put the original 1 x 3 x H x W over what was drawn, B x 3 x H x W, where the mask keeps it, bit for bit."""
    if mask is None:
        return drawn
    weight, original = softened(mask, edge).to(drawn.device), original.to(drawn)
    blended = torch.lerp(original, drawn.clamp(-1, 1), weight)  # on the edge; elsewhere exactly the one or the other
    return torch.where(weight == 0, original, torch.where(weight == 1, drawn, blended))


def remarks_on_mask(mask: Image.Image, image: Image.Image, white: Tensor, cell: int) -> list[str]:
    """List what of a mask cannot be followed as it is. white: see `read_mask`; cell: pixels a side of a latent."""
    found: list[str] = []
    if abs(mask.width * image.height / (mask.height * image.width) - 1) > STRETCH:
        sizes = f"{mask.width} x {mask.height} pixels and the picture {image.width} x {image.height}"
        found.append(f"the mask has {sizes}: it is stretched over the picture")
    if not white.any():
        return [*found, "the mask is nowhere lighter than 127 of 255: nothing is repainted"]
    levels = levels_of(mask).histogram()
    grey = sum(levels[GREY[0] : GREY[1]]) / sum(levels)
    if grey > MUCH:
        found.append(
            f"{grey:.0%} of the mask is grey: from 128 of 255 on it counts as white, below as black; a mask edge "
            "(--mask-edge) softens the border"
        )
    cells = F.interpolate(white, size=(white.shape[2] // cell, white.shape[3] // cell))
    painted = F.interpolate(cells, size=white.shape[2:])
    lost = 1 - ((white * painted).sum() / white.sum()).item()
    if lost > LOST:
        found.append(
            f"{lost:.0%} of the mask's white part is finer than the model's cells of {cell} x {cell} pixels, and is "
            "not repainted: make it thicker"
        )
    return found
