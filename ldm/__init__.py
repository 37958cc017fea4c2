"""Latent diffusion: denoisers, the mathematics of diffusion, samplers, training and use.

What a program needs is imported from here when it is first asked for, so that `import ldm` stays cheap.
"""

from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    match name:
        case "DrawOptions":
            from ldm.inference.options import DrawOptions as found
        case "DrawRequest":
            from ldm.inference.request import DrawRequest as found
        case "Drawing":
            from ldm.inference.recipe import Drawing as found
        case "TextToImage":
            from ldm.inference.pipeline import TextToImage as found
        case "autoguidance":
            from ldm.samplers.guidance import autoguidance as found
        case "invert":
            from ldm.samplers.inversion import invert as found
        case "log_likelihood":
            from ldm.samplers.likelihood import log_likelihood as found
        case _:
            raise AttributeError(f"module 'ldm' has no attribute {name!r}")
    return found
