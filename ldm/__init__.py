"""Latent diffusion: denoisers, the mathematics of diffusion, samplers, training and inference.

The names that a program needs are imported at first use, so that `import ldm` is fast.
"""

from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

from latent_foundry import find_below_ldm, offered

if TYPE_CHECKING:
    from ldm.inference.options import DrawOptions
    from ldm.inference.pipeline import TextToImage
    from ldm.inference.recipe import Drawing
    from ldm.inference.request import DrawRequest
    from ldm.samplers.guidance import autoguidance
    from ldm.samplers.likelihood import log_likelihood
    from ldm.samplers.single_step import invert

__all__ = ["DrawOptions", "DrawRequest", "Drawing", "TextToImage", "autoguidance", "invert", "log_likelihood"]

__path__ = extend_path(__path__, __name__)  # Other code is also called ldm: modules that ours does not have are theirs.
find_below_ldm()


def __getattr__(name: str) -> Any:
    return offered(__name__, name)
