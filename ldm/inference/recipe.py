"""The result of a drawing: a picture, and the record of how to draw it again."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ldm.files.digest import short_hash
from ldm.inference.parameter import parameters
from ldm.inference.pictures import picture_hash
from ldm.inference.request import DrawRequest, PictureSettings

if TYPE_CHECKING:
    from PIL import Image

    from ldm.diffusion import Prediction
    from ldm.inference.pipeline import TextToImage


@dataclass(frozen=True, kw_only=True)
class Recipe(PictureSettings):
    """Everything that a picture depends on, as stored in its PNG."""

    model: str
    weights_hash: str  # first 10 hex digits of the SHA-256 of the denoiser's file
    device: str
    precision: str
    software: str
    # Older pictures do not have these.
    vae: str = ""  # a file's name, and the first 10 hex digits of its SHA-256; "" is none
    loras: str = ""  # "name:0.8 0123456789, other 9876543210"
    init_image: str = ""  # first 10 hex digits of the SHA-256 of the file that the drawing started from
    mask: str = ""
    strength: float = 0.0  # 0: it started from noise
    prediction: str = ""  # as given to load; "": the model's own
    ema: bool = True  # whether averaged weights were used, if the file had both


class Drawing(NamedTuple):
    """A picture, and how it was drawn."""

    image: Image.Image
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class LoadedWith:
    """The options with which a model was loaded: see TextToImage.load."""

    vae: Path | None = None
    lora: Sequence[tuple[Path, float]] = ()
    ema: bool = True
    prediction: Prediction | None = None

    def recorded(self) -> dict[str, Any]:
        """Return them as fields of a Recipe. The first call reads the complete files, to hash them."""
        loras = [f"{file.name}{'' if by == 1 else f':{by:g}'} {file_hash(file)}" for file, by in self.lora]
        return {
            "vae": f"{self.vae.name} {file_hash(self.vae)}".strip() if self.vae else "",
            "loras": ", ".join(loras),
            "prediction": self.prediction or "",
            "ema": self.ema,
        }


def recipe_of(request: DrawRequest, pipe: TextToImage, image: Image.Image) -> Recipe:
    """Create the recipe of an image that a pipe drew for a checked request."""
    drawn = replace(request, width=image.width, height=image.height)
    settings = {name: about.kind(getattr(drawn, name)) for name, about in parameters(PictureSettings).items()}
    return Recipe(
        **settings | pipe.loaded_with.recorded(),
        options=request.options,
        model=pipe.name,
        weights_hash=pipe.weights_hash,
        device=str(pipe.device),
        precision=pipe.precision,
        software=software(),
        init_image="" if request.image is None else picture_hash(request.image),
        mask="" if request.mask is None else picture_hash(request.mask),
        strength=float(request.strength or 0),
    )


def software() -> str:
    """Return this program's name and, if it is installed, its version."""
    try:
        return f"Latent Foundry {importlib.metadata.version('latent-foundry')}"
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "Latent Foundry"


@cache
def file_hash(path: Path) -> str:
    """Return the first 10 hex digits of a file's SHA-256; "" for a folder."""
    return short_hash([path]) if path.is_file() else ""
