"""Latent diffusion: denoisers, the mathematics of diffusion, samplers, training and use.

What a program needs is imported from here when it is first asked for, so that `import ldm` stays cheap.
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
    from ldm.samplers.inversion import invert
    from ldm.samplers.likelihood import log_likelihood

__all__ = [
    "DrawOptions",
    "DrawRequest",
    "Drawing",
    "TextToImage",
    "autoguidance",
    "invert",
    "log_likelihood",
]

__path__ = extend_path(__path__, __name__)  # Other code is called ldm, too; what ours has not got is theirs.
find_below_ldm()


def __getattr__(name: str) -> Any:
    return offered(__name__, name)
