"""Latent diffusion: denoisers, the mathematics of diffusion, samplers, training and use.

`TextToImage` is what a program needs; it is imported when it is first asked for, so that `import ldm` stays cheap.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ldm.inference.pipeline import TextToImage

__all__ = ["TextToImage"]


def __getattr__(name: str) -> Any:
    if name == "TextToImage":
        from ldm.inference.pipeline import TextToImage

        return TextToImage
    raise AttributeError(f"module 'ldm' has no attribute {name!r}")
