"""Write LoRA files for other programs: in kohya's format, which most of them read, and diffusers'. Both keep alpha."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.interop.lora.layers import OLD_TEXT_PREFIX, LoraLayer
from ldm.interop.lora.names import METADATA_KEY, TEXT_PREFIX, kohya_name
from ldm.interop.network_files import write_weights


def write_lora_kohya(layers: Sequence[LoraLayer], path: Path, *, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file as kohya's scripts do, for Stable Diffusion 1 and 2.

    metadata: added to the file's own, which it may override. Raises ValueError for no layers, or a repeated layer.
    """
    _check_distinct(layers)
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        name = kohya_name(layer.part, layer.name)
        tensors[f"{name}.lora_down.weight"] = layer.down
        tensors[f"{name}.lora_up.weight"] = layer.up
        tensors[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    own = {"ss_network_module": "networks.lora"}
    ranks, alphas = {layer.rank for layer in layers}, {layer.alpha for layer in layers}
    if len(ranks) == len(alphas) == 1:
        own |= {"ss_network_dim": str(ranks.pop()), "ss_network_alpha": str(alphas.pop())}
    write_weights(tensors, path, own | dict(metadata or {}))


def write_lora_diffusers(
    layers: Sequence[LoraLayer], path: Path, *, denoiser_prefix: Literal["unet", "transformer"] = "unet"
) -> None:
    """Write a safetensors file for diffusers' load_lora_weights (0.34 and newer, which read alpha), in peft's format.

    denoiser_prefix: the folder of the denoiser in diffusers' layout. The text encoder's weights have the prefix
    `text_model.`, which new versions remove and old ones need; its settings do not, since they match a path's end.
    Raises ValueError for no layers, or a repeated layer.
    """
    _check_distinct(layers)
    tensors: dict[str, Tensor] = {}
    settings: dict[str, object] = {}
    for part, prefix, inner in (("denoiser", denoiser_prefix, ""), ("text_encoder", TEXT_PREFIX, OLD_TEXT_PREFIX)):
        own = [layer for layer in layers if layer.part == part]
        for layer in own:
            tensors[f"{prefix}.{inner}{layer.name}.lora_A.weight"] = layer.down
            tensors[f"{prefix}.{inner}{layer.name}.lora_B.weight"] = layer.up
        if own:
            settings |= {f"{prefix}.{key}": value for key, value in settings_of(own).items()}
    write_weights(tensors, path, {METADATA_KEY: json.dumps(settings, indent=2, sort_keys=True)})


def _check_distinct(layers: Sequence[LoraLayer]) -> None:
    places = [(layer.part, layer.name) for layer in layers]
    if not places:
        raise ValueError("a LoRA of no layers cannot be written: give at least one")
    if twice := {place for place in places if places.count(place) > 1}:
        part, name = min(twice)
        raise ValueError(
            f"layer {name} of the {part} occurs {places.count((part, name))} times: write each LoRA to its own file"
        )


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
