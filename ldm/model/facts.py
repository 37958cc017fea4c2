"""What a request must know of a model. Torch is not needed here: a request is checked before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.diffusion import PathConfig
    from ldm.samplers.stock.scheduler import StockScheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a model can draw. None: not known yet, so that nothing is checked against it."""

    name: str = "the model"
    path: PathConfig | None = None
    scheduler: StockScheduler | None = None  # what its folder says about sampling; None with a path: our own default
    unfollowed: str = ""  # what of its folder's sampling is not followed, so that our default is used
    learned_variance: bool | None = None  # whether the network has learned one
    native_size: int | None = None  # pixels a side, as in training
    factor: int | None = None  # height and width must be multiples of it: whole latents, and whole patches of them
    unusual_clip_skip: int = 0  # its own, if other programs assume another; 0 otherwise
    for_inpainting: bool | None = None


STOCK = "stock"  # in a request and in a picture's record: the sampler, grid and end that the model's folder states
UNKNOWN = ModelFacts()
