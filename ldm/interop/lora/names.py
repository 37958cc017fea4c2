"""The names that LoRA files give to layers, whole, so that a name is looked up and never guessed at.

Kohya's scripts write the path with `_` in place of dots, after diffusers or after CompVis; peft and diffusers write it
with dots. Below a name stand the factors, and alpha.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from ldm.interop.lora.layers import OLD_TEXT_PREFIX, Part

Role = Literal["down", "up", "alpha"]

ROLES: dict[str, Role] = {  # none of them is the end of another
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".lora_A.weight": "down",  # peft
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",  # diffusers
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",  # the same, of text encoders
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",  # diffusers' attention processors
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
DENOISER_PREFIXES = ("unet", "transformer", "")  # "": what a network alone wrote
TEXT_PREFIX = "text_encoder"
KOHYA_DENOISER, KOHYA_TEXT = "lora_unet_", ("lora_te_", "lora_te1_")


class Place(NamedTuple):
    """The layer that a name in a file means."""

    part: Part
    name: str
    prefix: str | None  # under which the file's metadata may tell of alpha; None: nowhere


# What is a change of weights too, but another one: how it is called, and how its tensors' names end.
OTHER_KINDS = {
    "DoRA": re.compile(r"\.dora_scale$|\.lora_magnitude_vector(\.weight)?$"),
    "LoHa": re.compile(r"\.hada_(w|t)\w+$"),
    "LoKr": re.compile(r"\.lokr_(w|t)\w+$"),
    "IA3": re.compile(r"\.on_input$|\.ia3_l$"),
    "OFT": re.compile(r"\.b?oft_\w+(\.weight)?$"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "a LoRA with CP-decomposed convolutions (lora_mid)": re.compile(r"\.lora_mid\.weight$"),
    "a LoRA with whole differences of weights (diff)": re.compile(r"\.diff(_b)?$"),
    "a LoRA with normalisation layers": re.compile(r"\.[wb]_norm$"),
    "a LoRA in peft's own form, whose alpha lies in another file": re.compile(r"^base_model\.model\."),
}
# Names of layers that this program's models lack.
OTHER_MODELS = {
    "SDXL": re.compile(
        r"^(lora_te2_|text_encoder_2\.)|(attentions|put_blocks|middle_block)[._0-9]+transformer_blocks[._][1-9]"
    ),
    "Flux": re.compile(r"double_blocks|single_blocks|single_transformer_blocks"),
}
CONTEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}


def split_name(key: str) -> tuple[str, Role] | None:
    """A tensor's name -> its layer's, and what it is; None for what no LoRA holds."""
    for ending, role in ROLES.items():
        if key.endswith(ending):
            return key.removesuffix(ending), role
    return None


def refuse_other_kinds(keys: Iterable[str]) -> None:
    """Raise ValueError, by its name, for a change of weights that is no LoRA."""
    for key in keys:
        for kind, ending in OTHER_KINDS.items():
            if ending.search(key):
                raise ValueError(f"this is {kind}, by its tensor {key}: not supported, give a LoRA of down and up")


def likely_model(paths: Iterable[str]) -> str | None:
    """Whose layers these are."""
    named = (model for path in paths for model, mark in OTHER_MODELS.items() if mark.search(path))
    return next(named, None)


def known_names(layers: Iterable[tuple[Part, str]], compvis_names: Mapping[str, str]) -> dict[str, Place]:
    """Every name under which a file may speak of these layers. compvis_names: CompVis's module path -> ours."""
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
    """As kohya's scripts write it, for Stable Diffusion 1 and 2."""
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
