"""Read LoRA files, by the names of their tensors. A file with a tensor that cannot be used is refused.

Diffusers stores peft's settings as JSON in the metadata. Keys have the prefix of their part, as in `unet.lora_alpha`.
Exceptions for rank and alpha match the end of a module's path.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.files.messages import SHOWN
from ldm.files.strict_json import parse_json
from ldm.interop.identify import is_single_file, looks_like, shapes_of
from ldm.interop.lora.layers import OLD_TEXT_PREFIX, Adaptable, LoraLayer, Part, adaptable_layers, factor_shapes, misfit
from ldm.interop.lora.names import DENOISER_PREFIXES, METADATA_KEY, TEXT_PREFIX, Place, Role, known_names, split_name
from ldm.interop.weight_reader import FLOATS, Weights

Tensors = dict[str, dict[Role, Tensor]]  # by the layer's name in the file
PREFIXES = {*DENOISER_PREFIXES, TEXT_PREFIX} - {""}
# Other initialisations change the base weights that a LoRA is trained on, so that it does not fit the model's weights.
INITS = (None, True, False, "gaussian", "eva", "orthogonal")
Settings = Mapping[str, Any]
# Other kinds of weight changes: their names, and the endings of their tensors' names.
OTHER_KINDS = {
    "DoRA": re.compile(r"\.dora_scale$|\.lora_magnitude_vector(\.weight)?$"),
    "LoHa": re.compile(r"\.hada_(w|t)\w+$"),
    "LoKr": re.compile(r"\.lokr_(w|t)\w+$"),
    "IA3": re.compile(r"\.on_input$|\.ia3_l$"),
    "OFT": re.compile(r"\.b?oft_\w+(\.weight)?$"),
    "GLoRA": re.compile(r"\.[ab][12]\.weight$"),
    "a LoRA with CP-decomposed convolutions (lora_mid)": re.compile(r"\.lora_mid\.weight$"),
    "a LoRA with full weight differences (diff)": re.compile(r"\.diff(_b)?$"),
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


def read_lora(
    weights: Weights, *, denoiser: nn.Module, text_encoder: nn.Module, compvis_names: Mapping[str, str] | None = None
) -> list[LoraLayer]:
    """Read a LoRA's layers for this denoiser and this TransformersTextEncoder from an opened file.

    compvis_names: CompVis's module path -> ours, for files that use CompVis's names. The factors keep their precision,
    and get the layer's shape if a matrix was trained for a 1 x 1 convolution or the reverse. Raises ValueError of one
    line, naming the file, if it is not a LoRA, is another kind of one, was made for another model, or is damaged.
    """
    modules = adaptable_layers(denoiser, text_encoder)
    try:
        tensors = _by_layer(weights.tensors)
        places = known_names(modules, compvis_names or {})
        _check_places(tensors, places)
        settings = read_settings(weights.metadata)
        layers = [_layer(path, found, places[path], settings) for path, found in tensors.items()]
        return _fitted(layers, modules)
    except ValueError as error:
        raise ValueError(f"{weights.source}: {error}") from error


def _by_layer(weights: Mapping[str, Tensor]) -> Tensors:
    refuse_other_kinds(weights)
    names = {key: name for key in weights if (name := split_name(key))}
    if not names:
        raise ValueError(_what_it_is(weights))
    if strange := [key for key in weights if key not in names]:
        raise ValueError(f"{_some(strange, 'tensors')} belong to no layer of a LoRA: not supported")
    tensors: Tensors = {}
    for key, (path, role) in names.items():
        if role in tensors.setdefault(path, {}):
            raise ValueError(f"layer {path} has a second {role}, {key}: get the file again")
        _check_numbers(key, weights[key], role)
        tensors[path][role] = weights[key]
    return tensors


def _what_it_is(weights: Mapping[str, Tensor]) -> str:
    """Return the error message for a file without factors."""
    shapes = shapes_of(weights)
    foreign = looks_like(shapes)
    known = foreign.name if foreign else "a complete model" if is_single_file(shapes) else ""
    return f"this is not a LoRA, {_some(list(weights), 'tensors')}{known and f', looks like {known}'}: give a LoRA file"


def _check_numbers(key: str, tensor: Tensor, role: Role) -> None:
    if tensor.dtype not in FLOATS and not (role == "alpha" and tensor.dtype in (torch.int32, torch.int64)):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"tensor {key} holds {kind}, expected {', '.join(FLOATS.values())}: convert it")
    if not tensor.isfinite().all():
        raise ValueError(f"tensor {key} holds NaN or infinity: this file is damaged, get it again")
    if role == "alpha" and tensor.numel() != 1:
        raise ValueError(f"tensor {key} has shape {tuple(tensor.shape)}, expected one number: get the file again")


def _check_places(tensors: Tensors, places: Mapping[str, Place]) -> None:
    """Raise ValueError for layers that the model lacks, that are incomplete, or that occur twice."""
    if foreign := [path for path in tensors if path not in places]:
        model = next((name for path in foreign for name, mark in OTHER_MODELS.items() if mark.search(path)), None)
        raise _other_model(model, f"of its {len(tensors)} layers this one lacks {_some(foreign)}")
    for path, found in tensors.items():
        if lost := {"down", "up"} - found.keys():
            raise ValueError(f"layer {path} has no {' and no '.join(sorted(lost))}: get the file again")
    named: dict[tuple[Part, str], str] = {}
    for path in tensors:
        other = named.setdefault(places[path][:2], path)
        if other != path:
            raise ValueError(f"{other} and {path} are the same layer: give a file that holds each once")


def _layer(path: str, found: dict[Role, Tensor], place: Place, settings: Mapping[str, Settings]) -> LoraLayer:
    down, up = found["down"], found["up"]
    rank = down.shape[0] if down.ndim else 0
    if "alpha" in found:
        alpha = float(found["alpha"].item())
    elif not settings:
        alpha = float(rank)
    elif place.prefix is not None and place.prefix in settings:
        alpha = alpha_by_settings(settings[place.prefix], place.name, rank)
    else:
        raise ValueError(f"its metadata states the alpha of some layers, but not of {path}: get the file again")
    return LoraLayer(place.part, place.name, down, up, alpha)


def _fitted(layers: list[LoraLayer], modules: Mapping[tuple[Part, str], Adaptable]) -> list[LoraLayer]:
    """Reshape the factors to the modules' shapes. Raises ValueError with the number of layers that do not fit."""
    fitted: list[LoraLayer] = []
    misfits: list[LoraLayer] = []
    for layer in layers:
        weight = modules[layer.part, layer.name].weight
        shapes = factor_shapes(weight, layer.rank)
        if tuple(_matrix(factor.shape) for factor in (layer.down, layer.up)) == tuple(map(_matrix, shapes)):
            down, up = layer.down.reshape(shapes[0]), layer.up.reshape(shapes[1])
            fitted.append(LoraLayer(layer.part, layer.name, down, up, layer.alpha))
        else:
            misfits.append(layer)
    if misfits:
        first = misfits[0]
        reason = misfit(first.name, first.down, first.up, modules[first.part, first.name].weight)
        widths = {layer.down.shape[1] for layer in misfits if layer.name.endswith("attn2.to_k")}
        model = CONTEXT_WIDTHS.get(widths.pop()) if len(widths) == 1 else None
        raise _other_model(model, f"{len(misfits)} of its {len(layers)} layers do not fit, as {reason}")
    return fitted


def _other_model(name: str | None, problem: str) -> ValueError:
    looks = f" (looks like {name})" if name else ""
    return ValueError(f"this LoRA was made for another model{looks}: {problem}: give a LoRA for this model")


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a 1 x 1 convolution as that of a matrix."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def _some(names: list[str], what: str = "") -> str:
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names)}{f' {what}' if what else ''} ({shown})"


def refuse_other_kinds(keys: Iterable[str]) -> None:
    """Raise ValueError, naming the kind, for a weight change that is not a LoRA."""
    for key in keys:
        for kind, ending in OTHER_KINDS.items():
            if ending.search(key):
                raise ValueError(f"this is {kind}, by its tensor {key}: not supported, give a LoRA of down and up")


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
