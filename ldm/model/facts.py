"""What a request must know of a model. Torch is not needed here: a request is checked before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.diffusion import PathConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a model can draw. None: not known yet, so that nothing is checked against it."""

    name: str = "the model"
    path: PathConfig | None = None
    learned_variance: bool | None = None  # whether the network has learned one
    native_size: int | None = None  # pixels a side, as in training
    factor: int | None = None  # height and width must be multiples of it: whole latents, and whole patches of them
    for_inpainting: bool | None = None


UNKNOWN = ModelFacts()
