"""Peft's settings of a LoRA, which state its alpha: in a file's metadata, or in adapter_config.json next to it.

Diffusers stores them as JSON in the metadata. Keys have the prefix of their part, as in `unet.lora_alpha`; those of an
adapter_config.json have none. Exceptions for rank and alpha match the end of a module's path.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import Any

from ldm.files.strict_json import parse_json
from ldm.interop.lora.layers import OLD_TEXT_PREFIX
from ldm.interop.lora.names import DENOISER_PREFIXES, METADATA_KEY, TEXT_PREFIXES

Settings = Mapping[str, Any]
PREFIXES = {*DENOISER_PREFIXES.values(), *TEXT_PREFIXES.values()} - {"", None}
KINDS = ("LORA", "LOHA", "LOKR", "IA3", None)
# Other initialisations change the base weights that a LoRA is trained on, so that it does not fit the model's weights.
INITS = (True, None, False, "gaussian", "eva", "orthogonal")


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


def alpha_by_settings(settings: Settings, name: str, rank: int) -> tuple[float, int]:
    """Return an alpha and a rank for which alpha / rank is peft's scale.

    rank: that of the tensors; 0 if they do not give it, as for a LoKr of two full matrices, which peft scales and
    LyCORIS does not. With use_rslora the scale is lora_alpha / sqrt(rank): Kalajdzievski 2023 (arXiv 2312.03732),
    theorem 3.2. Raises ValueError if the settings have another rank, or no alpha.
    """
    stated = _setting(settings, "r", "rank_pattern", name)
    if not rank and type(stated) is int and 0 < stated <= sys.maxsize:
        rank = stated
    if stated not in (None, rank) or not rank:
        raise ValueError(
            f"layer {name} has rank {rank}, but metadata {METADATA_KEY} says {str(stated)[:60]}: get the file again"
        )
    alpha = _setting(settings, "alpha" if "alpha" in settings else "lora_alpha", "alpha_pattern", name)
    if type(alpha) not in (int, float) or not abs(alpha) <= sys.float_info.max:  # JSON allows larger integers
        raise ValueError(f"metadata {METADATA_KEY} gives {name} the alpha {alpha!r}, expected a number")
    return alpha * math.sqrt(rank) if settings.get("use_rslora") else float(alpha), rank


def _check(settings: Settings) -> None:
    for key, known in (("peft_type", KINDS), ("init_lora_weights", INITS)):
        if settings.get(key) not in known:
            raise ValueError(f"its metadata has {key} {settings[key]!r}, expected {known[0]!r}: not supported")
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
