"""Names of samplers and time grids as other programs write them."""

import re
from collections.abc import Iterable, Mapping

# Short forms at the end of a sampler's name: A1111's before 1.6 (k_dpmpp_2m_ka) and InvokeAI's (dpmpp_2m_k).
SUFFIXES = {"ka": "karras", "k": "karras", "exp": "exponential"}


def squeezed(name: str) -> str:
    """Return what two spellings of a name have in common: "DPM++ 2M SDE", "dpmpp_2m_sde" and "k_dpmpp_2m_sde"."""
    name = re.sub(r"^k[\s_]|[\s_-]", " ", name.strip().lower().replace("++", "pp"))
    return re.sub(r" a( |$)", r" ancestral\1", name).replace(" ", "")


def spellings(samplers: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return the key of each spelling, squeezed. samplers: the other names of each key."""
    return {squeezed(name): key for key, others in samplers.items() for name in (key, *others)}


def split_name(name: str, samplers: Mapping[str, str], grids: Mapping[str, str]) -> tuple[str, str | None] | None:
    """Split "DPM++ 2M Karras" into the keys of a sampler and of a time grid, which is None in "DPM++ 2M".

    samplers, grids: the keys by squeezed spelling. Returns None for a name that is neither.
    """
    word = squeezed(name)
    if word in samplers:
        return samplers[word], None
    for ending, grid in grids.items():
        if word.endswith(ending) and (sampler := samplers.get(word.removesuffix(ending))):
            return sampler, grid
    return None
