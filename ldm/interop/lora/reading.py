"""Read LoRA files, by the names of their tensors. A file with a tensor that cannot be used is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.files.messages import SHOWN
from ldm.interop.identify import is_single_file, looks_like, shapes_of
from ldm.interop.lora.layers import Adaptable, LoraLayer, Part, adaptable_layers, factor_shapes, misfit
from ldm.interop.lora.names import (
    CONTEXT_WIDTHS,
    Place,
    Role,
    known_names,
    likely_model,
    refuse_other_kinds,
    split_name,
)
from ldm.interop.lora.settings import Settings, alpha_by_settings, read_settings
from ldm.interop.weight_reader import FLOATS

Tensors = dict[str, dict[Role, Tensor]]  # by the layer's name in the file


def read_lora(
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    denoiser: nn.Module,
    text_encoder: nn.Module,
    source: Path,
    compvis_names: Mapping[str, str] | None = None,
) -> list[LoraLayer]:
    """Read a LoRA's layers for this denoiser and this TransformersTextEncoder from the content of a file.

    compvis_names: CompVis's module path -> ours, for files that use CompVis's names. The factors keep their precision,
    and get the layer's shape if a matrix was trained for a 1 x 1 convolution or the reverse. Raises ValueError of one
    line, naming the file, if it is not a LoRA, is another kind of one, was made for another model, or is damaged.
    """
    modules = adaptable_layers(denoiser, text_encoder)
    try:
        tensors = _by_layer(weights)
        places = known_names(modules, compvis_names or {})
        _check_places(tensors, places)
        settings = read_settings(metadata)
        layers = [_layer(path, found, places[path], settings) for path, found in tensors.items()]
        return _fitted(layers, modules)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


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
        model = likely_model(foreign)
        raise ValueError(
            f"this LoRA was made for another model{f' (looks like {model})' if model else ''}: of its {len(tensors)} "
            f"layers this one lacks {_some(foreign)}: give a LoRA for this model"
        )
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
        raise ValueError(
            f"this LoRA was made for another model{f' (looks like {model})' if model else ''}: {len(misfits)} of its "
            f"{len(layers)} layers do not fit, as {reason}: give a LoRA for this model"
        )
    return fitted


def _matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a 1 x 1 convolution as that of a matrix."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def _some(names: list[str], what: str = "") -> str:
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names)}{f' {what}' if what else ''} ({shown})"
