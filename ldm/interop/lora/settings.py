"""Read and write peft's settings of a LoRA, which diffusers stores as JSON in a safetensors file's metadata.

Keys have the prefix of their part, as in `unet.lora_alpha`. Exceptions for rank and alpha match the end of a module's
path.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ldm.files.strict_json import parse_json
from ldm.interop.lora.layers import OLD_TEXT_PREFIX, LoraLayer
from ldm.interop.lora.names import DENOISER_PREFIXES, TEXT_PREFIX

METADATA_KEY = "lora_adapter_metadata"
PREFIXES = {*DENOISER_PREFIXES, TEXT_PREFIX} - {""}
# Other initialisations change the base weights that a LoRA is trained on, so that it does not fit the model's weights.
INITS = (None, True, False, "gaussian", "eva", "orthogonal")
Settings = Mapping[str, Any]


def read_settings(metadata: Mapping[str, str]) -> dict[str, Settings]:
    """Read a file's settings by prefix; "": without one. Raises ValueError for settings that are not supported."""
    if METADATA_KEY not in metadata:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for key, value in parse_json(metadata[METADATA_KEY], source=f"metadata {METADATA_KEY}").items():
        prefix, _, name = key.partition(".")
        prefix, name = (prefix, name) if prefix in PREFIXES else ("", key)
        found.setdefault(prefix, {})[name] = value
    for settings in found.values():
        _check(settings)
    return dict(found)


def alpha_by_settings(settings: Settings, name: str, rank: int) -> float:
    """Return the alpha for which alpha / rank is peft's scale.

    With use_rslora that scale is lora_alpha / sqrt(rank): Kalajdzievski 2023 (arXiv 2312.03732), theorem 3.2. Raises
    ValueError if the settings have another rank, or no alpha.
    """
    stated = _setting(settings, "r", "rank_pattern", name)
    if stated not in (None, rank):
        raise ValueError(
            f"layer {name} has rank {rank}, but metadata {METADATA_KEY} says {stated!r}: get the file again"
        )
    alpha = _setting(settings, "lora_alpha", "alpha_pattern", name)
    if type(alpha) not in (int, float) or not abs(alpha) <= sys.float_info.max:  # JSON allows larger integers
        raise ValueError(f"metadata {METADATA_KEY} gives {name} the alpha {alpha!r}, expected a number")
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else float(alpha)


def settings_of(layers: Sequence[LoraLayer]) -> dict[str, Any]:
    """Build peft's settings for the layers of one part: the commonest rank and alpha, and exceptions."""
    ranks = {layer.name: layer.rank for layer in layers}
    alphas = {layer.name: int(layer.alpha) if layer.alpha.is_integer() else layer.alpha for layer in layers}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: number for name, number in ranks.items() if number != rank},
        "alpha_pattern": {name: number for name, number in alphas.items() if number != alpha},
        "target_modules": sorted(ranks),
    }


def _commonest(numbers: Iterable[float]) -> float:
    """Return the commonest number; if there are several, the smallest."""
    counts = Counter(numbers)
    return min(counts, key=lambda number: (-counts[number], number))


def _check(settings: Settings) -> None:
    if settings.get("use_dora"):
        raise ValueError("this is DoRA, by its metadata use_dora: not supported, give a LoRA of down and up")
    for key, known in (("peft_type", (None, "LORA")), ("init_lora_weights", INITS)):
        if settings.get(key) not in known:
            raise ValueError(f"its metadata has {key} {settings[key]!r}, expected {known[1]!r}: not supported")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = settings.get(key) or {}
        if not isinstance(pattern, dict):
            raise ValueError(f"its metadata has {key} {str(pattern)[:60]!r}, expected numbers by module: get it again")
        if odd := [name for name in pattern if not re.fullmatch(r"\^?[\w.]+", name)]:
            raise ValueError(f"its metadata has {key} for {odd[0]!r}, expected the path of a module: not supported")


def _setting(settings: Settings, key: str, pattern_key: str, name: str) -> Any:
    """Return the value of the first exception that matches the end of the module's path, otherwise the default. A
    pattern with ^ must match the full path."""
    for pattern, value in (settings.get(pattern_key) or {}).items():
        path = pattern.removeprefix("^").removeprefix(OLD_TEXT_PREFIX)
        if name == path or (pattern[0] != "^" and name.endswith(f".{path}")):
            return value
    return settings.get(key)
