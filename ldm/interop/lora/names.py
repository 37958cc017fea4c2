"""All full names that LoRA files use for layers, so that a name is looked up and never guessed.

Kohya's scripts write diffusers' or CompVis's module path with `_` in place of dots; peft, diffusers and ComfyUI write
it with dots. The tensors of a change are stored under the name of a layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from ldm.interop.lora.layers import OLD_TEXT_PREFIX, Part

Role = str  # what a tensor is in the change of its layer

LYCORIS_ROLES = (
    *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    *("diff", "diff_b", "w_norm", "b_norm", "oft_blocks", "rescale", "on_input", "ia3_l"),
    *("alpha", "scalar", "dora_scale"),
)
ROLES: dict[str, Role] = {  # none is a suffix of another
    ".lora_down.weight": "down",  # kohya
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",  # peft
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    ".lora_A": "down",
    ".lora_B": "up",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".lora.down.weight": "down",  # diffusers
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",  # diffusers, for text encoders
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",  # diffusers' attention processors
    "_lora.up.weight": "up",
    **{f".{role}.weight": role for role in ("a1", "a2", "b1", "b2")},  # GLoRA
    **{f".{role}": role for role in LYCORIS_ROLES},
}
# peft's modules have the name of their adapter behind that of a tensor, `default` if nobody gave another.
ADAPTER = re.compile(
    r"(\.(?:lora_[AB]|lora_magnitude_vector|ia3_l|hada_\w+|lokr_\w+))\.(?!(?:weight|bias)$)[\w-]+(?=\.weight$|\.bias$|$)"
)
IA3_FLAG, IA3_WEIGHT = ".on_input", ".weight"  # the second is a weight's own name, unless the first is next to it
BUNDLED = re.compile(r"bundle_emb\.(.+?)\.(string_to_(?:param|token)\..+|[^.]+)")

PEFT_PREFIX = "base_model.model"
# Prefixes with a dot -> that of the settings in the file's metadata, which may state alpha; None: nowhere.
DENOISER_PREFIXES: dict[str, str | None] = {
    "": "",  # files saved from a single network
    "unet": "unet",
    "transformer": "transformer",
    PEFT_PREFIX: "",
    f"unet.{PEFT_PREFIX}": "unet",
    f"transformer.{PEFT_PREFIX}": "transformer",
    "diffusion_model": None,  # ComfyUI
    "model.diffusion_model": None,
}
TEXT_PREFIX = "text_encoder"
TEXT_PREFIXES: dict[str, str | None] = {
    "": "",
    TEXT_PREFIX: TEXT_PREFIX,
    PEFT_PREFIX: "",
    f"{TEXT_PREFIX}.{PEFT_PREFIX}": TEXT_PREFIX,
    **{f"{start}clip_{kind}.transformer": None for start in ("", "text_encoders.") for kind in "lh"},  # ComfyUI
}
METADATA_KEY = "lora_adapter_metadata"
# Prefixes of names without dots: kohya's and OneTrainer's first, LyCORIS's own, kohya's OFT.
KOHYA_DENOISER = ("lora_unet_", "lycoris_", "lycoris_unet_", "oft_unet_", "unet_", "lora_transformer_")
KOHYA_TEXT = ("lora_te_", "lora_te1_", "lycoris_", "lycoris_te_", "lycoris_te1_", "te_", "te1_")


class Place(NamedTuple):
    """The layer to which a name in a file refers."""

    part: Part
    name: str
    prefix: str | None  # under which the file's metadata may state alpha; None: nowhere


def split_names(keys: Iterable[str]) -> dict[str, tuple[str, Role]]:
    """Split tensors' names into the name of the layer and the role; those that no LoRA has are left out."""
    known = dict.fromkeys(keys)
    found = {key: name for key in known if (name := _split(ADAPTER.sub(r"\1", key)))}
    flags = [key.removesuffix(IA3_FLAG) for key in known if key.endswith(IA3_FLAG)]
    return found | {path + IA3_WEIGHT: (path, "ia3_weight") for path in flags if path + IA3_WEIGHT in known}


def _split(key: str) -> tuple[str, Role] | None:
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
        spelled: Place("denoiser", name, prefix)
        for path, name in compvis_names.items()
        if ("denoiser", name) in ours
        for spelled, prefix in _spelled(path, KOHYA_DENOISER, DENOISER_PREFIXES)
    }
    return places | theirs


def kohya_name(part: Part, name: str) -> str:
    """Return the name that kohya's scripts write, for Stable Diffusion 1 and 2."""
    return KOHYA_DENOISER[0] + _flat(name) if part == "denoiser" else KOHYA_TEXT[0] + _flat(OLD_TEXT_PREFIX + name)


def _spelled(
    path: str, flat: Iterable[str], dotted: Mapping[str, str | None], also: str | None = None
) -> Iterator[tuple[str, str | None]]:
    """List a module's path under all prefixes; also: another form of it, which is written with dots only."""
    yield from ((prefix + _flat(path), None) for prefix in flat)
    for prefix, of_settings in dotted.items():
        for form in {path, also or path}:
            yield f"{prefix}.{form}".removeprefix("."), of_settings


def _denoiser_names(name: str) -> Iterator[tuple[str, str | None]]:
    processor = re.sub(r"\.(to_q|to_k|to_v|to_out)(\.0)?$", r".processor.\1", name)
    return _spelled(name, KOHYA_DENOISER, DENOISER_PREFIXES, processor)


def _text_names(name: str) -> Iterator[tuple[str, str | None]]:
    for full in (name, OLD_TEXT_PREFIX + name):
        yield from _spelled(full, KOHYA_TEXT, TEXT_PREFIXES, re.sub(r"\.(q|k|v|out)_proj$", r".to_\1", full))


def _flat(path: str) -> str:
    return path.replace(".", "_")
