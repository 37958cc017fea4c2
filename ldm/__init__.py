"""Latent diffusion: denoisers, the mathematics of diffusion, samplers, training and use.

`TextToImage` is what a program needs; it is imported when it is first asked for, so that `import ldm` stays cheap.
"""

from pkgutil import extend_path
from typing import TYPE_CHECKING, Any

from latent_foundry import find_below_ldm, offered

if TYPE_CHECKING:
    from ldm.inference.pipeline import TextToImage

__all__ = ["TextToImage"]

__path__ = extend_path(__path__, __name__)  # Other code is called ldm, too; what ours has not got is theirs.
find_below_ldm()


def __getattr__(name: str) -> Any:
    return offered(__name__, name)
