"""All full names that LoRA files use for layers, so that a name is looked up and never guessed.

Kohya's scripts write diffusers' or CompVis's module path with `_` in place of dots; peft and diffusers write it with
dots. The factors and alpha are stored under the name of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from ldm.interop.lora.layers import OLD_TEXT_PREFIX, Part

Role = Literal["down", "up", "alpha"]

ROLES: dict[str, Role] = {  # none is a suffix of another
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",  # peft
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",  # diffusers
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",  # diffusers, for text encoders
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",  # diffusers' attention processors
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
DENOISER_PREFIXES = ("unet", "transformer", "")  # "": files saved from a single network
TEXT_PREFIX = "text_encoder"
METADATA_KEY = "lora_adapter_metadata"
KOHYA_DENOISER, KOHYA_TEXT = "lora_unet_", ("lora_te_", "lora_te1_")


class Place(NamedTuple):
    """The layer to which a name in a file refers."""

    part: Part
    name: str
    prefix: str | None  # under which the file's metadata may state alpha; None: nowhere


def split_name(key: str) -> tuple[str, Role] | None:
    """Split a tensor's name into its layer's name and its role; None for a tensor that no LoRA has."""
    for ending, role in ROLES.items():
        if key.endswith(ending):
            return key.removesuffix(ending), role
    return None


def known_names(layers: Iterable[tuple[Part, str]], compvis_names: Mapping[str, str]) -> dict[str, Place]:
    """List every name that a file may use for these layers. compvis_names: CompVis's module path -> ours."""
    ours = set(layers)
    places = {
        spelled: Place(part, name, prefix)
        for part, name in ours
        for spelled, prefix in (_denoiser_names(name) if part == "denoiser" else _text_names(name))
    }
    theirs = {
        KOHYA_DENOISER + _flat(path): Place("denoiser", name, None)
        for path, name in compvis_names.items()
        if ("denoiser", name) in ours
    }
    return places | theirs


def kohya_name(part: Part, name: str) -> str:
    """Return the name that kohya's scripts write, for Stable Diffusion 1 and 2."""
    return KOHYA_DENOISER + _flat(name) if part == "denoiser" else KOHYA_TEXT[0] + _flat(OLD_TEXT_PREFIX + name)


def _denoiser_names(name: str) -> Iterator[tuple[str, str | None]]:
    yield kohya_name("denoiser", name), None
    processor = re.sub(r"\.(to_q|to_k|to_v|to_out)(\.0)?$", r".processor.\1", name)
    for prefix in DENOISER_PREFIXES:
        for spelled in {name, processor}:
            yield f"{prefix}.{spelled}".removeprefix("."), prefix


def _text_names(name: str) -> Iterator[tuple[str, str | None]]:
    for full in (name, OLD_TEXT_PREFIX + name):
        for prefix in KOHYA_TEXT:
            yield prefix + _flat(full), None
        for spelled in {full, re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", full)}:
            yield f"{TEXT_PREFIX}.{spelled}", TEXT_PREFIX


def _flat(path: str) -> str:
    return path.replace(".", "_")
