"""What a drawing is returned as: pictures that carry their record, arrays, tensors or latents."""

from __future__ import annotations

from typing import Any

from PIL import Image
from torch import Tensor

from ldm.files.messages import unknown_name
from ldm.inference.contact_sheet import to_images
from ldm.inference.recipe import Recipe, png_info, png_texts

OUTPUT_TYPES = ("pil", "np", "pt", "latent")  # diffusers' words


class DrawnImage(Image.Image):
    """A picture whose info holds the texts of its record, which `save` writes into a PNG.

    Pillow writes only what it is given as `pnginfo`, so save adds that. What is derived from the picture (a copy, a
    part, another size) is a plain image, which is saved without them.
    """

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        """Save as Pillow does. pnginfo: the texts of a PNG file; by default those of the picture's record."""
        params.setdefault("pnginfo", png_info(self.info))
        super().save(fp, format, **params)


def carrying(image: Image.Image, recipe: Recipe) -> DrawnImage:
    """Return the same picture, with its record."""
    own = DrawnImage()
    own.__dict__.update(image.__dict__)
    own.info = image.info | png_texts([recipe])
    return own


def check_output_type(name: str) -> None:
    """Raise ValueError for an unknown kind of output."""
    if name not in OUTPUT_TYPES:
        raise unknown_name("output type", str(name), {known: known for known in OUTPUT_TYPES})


def returned(drawn: Tensor, output_type: str) -> Any:
    """Convert pixels N x 3 x H x W in [-1, 1] to PIL images, an array N x H x W x 3 or a tensor N x 3 x H x W, both
    float32 in [0, 1]; latents stay as they are."""
    if output_type == "latent":
        return drawn
    if output_type == "pil":
        return to_images(drawn)
    scaled = (drawn.clamp(-1, 1) + 1) / 2
    return scaled if output_type == "pt" else scaled.permute(0, 2, 3, 1).cpu().numpy()
