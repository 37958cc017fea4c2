"""Read LoRA files, by the names of their tensors. A file with a tensor that would change a picture, and cannot be used,
is refused."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ldm.files.messages import SHOWN
from ldm.interop.identify import LORA, is_single_file, looks_like, shapes_of
from ldm.interop.lora.changes import DoraChange
from ldm.interop.lora.families import FLAGS, MAGNITUDES, SETTINGS, Family, Scale, changes_of, family_of, is_nothing
from ldm.interop.lora.layers import (
    Adaptable,
    LayerChange,
    LoraLayer,
    Part,
    adaptable_layers,
    as_matrix,
    factor_shapes,
)
from ldm.interop.lora.names import BUNDLED, PEFT_PREFIX, Place, Role, known_names, split_names
from ldm.interop.lora.settings import Settings, alpha_by_settings, read_settings
from ldm.interop.weight_reader import FLOATS, Weights

Tensors = dict[str, dict[Role, Tensor]]  # by the layer's name in the file
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# Other kinds of weight changes: their names, and the endings of their tensors' names.
OTHER_KINDS = {
    "OFT or BOFT of peft": re.compile(r"\.b?oft_[rRsS](\.[\w-]+)*$"),
    "AdaLoRA": re.compile(r"\.(lora_E|ranknum)(\.[\w-]+)*$"),
    "VeRA": re.compile(r"(^|\.)vera_(lambda_[bd]|[AB])(\.[\w-]+)*$"),
    "T-LoRA": re.compile(r"\.([qp]_layer\.weight|lambda_layer)$"),
    "a LoRA of a table of embeddings": re.compile(r"\.lora_embedding_[AB](\.[\w-]+)*$"),
    "a LoRA with sparse biases": re.compile(r"\.bias_(indices|values|size)$"),
    "a file that replaces or reshapes weights": re.compile(r"\.(set|reshape)_weight$"),
}
# Tensors of CLIP and of trainers that play no part in a picture of Stable Diffusion 1 and 2.
WITHOUT_EFFECT = re.compile(
    r"(.*[._])?(logit_scale|position_ids|global_step|text_projection(\.(lora|hada|lokr|oft|dora|alpha|scalar|diff).*)?)"
)
# Names of layers that this program's models lack.
OTHER_MODELS = {
    "SDXL": re.compile(
        r"^(lora_te2_|lycoris_te2_|text_encoder_2\.|(text_encoders\.)?clip_g\.)"
        r"|(attentions|put_blocks|middle_block)[._0-9]+transformer_blocks[._][1-9]"
    ),
    "Flux": re.compile(r"double_blocks|single_blocks|single_transformer_blocks"),
}
CONTEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}


def read_lora(
    weights: Weights, *, denoiser: nn.Module, text_encoder: nn.Module, compvis_names: Mapping[str, str] | None = None
) -> list[LayerChange]:
    """Read a file's changes for this denoiser and this TransformersTextEncoder. Embeddings in it are left out.

    compvis_names: CompVis's module path -> ours, for files that use CompVis's names. LoRA's factors keep their
    precision, and get the layer's shape if a matrix was trained for a 1 x 1 convolution or the reverse. Warns, in one
    line, of tensors that have no effect. Raises ValueError of one line, naming the file, if it is not a LoRA, is of
    another kind, was made for another model, or is damaged.
    """
    modules = adaptable_layers(denoiser, text_encoder)
    try:
        tensors, idle = _by_layer(weights.tensors)
        places = known_names(modules, compvis_names or {})
        families = _check_places(tensors, places)
        settings = read_settings(weights.metadata)
        changes = [
            change
            for path, found in tensors.items()
            for change in _changes(path, found, families[path], places[path], settings)
        ]
        fitted = _fitted(changes, modules)
    except ValueError as error:
        raise ValueError(f"{weights.source}: {error}") from error
    if idle:
        warnings.warn(f"{weights.source}: {_some(idle, 'tensors')} have no effect on pictures: ignored", stacklevel=2)
    return fitted


def bundled_embeddings(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Collect the embeddings (textual inversion) that a LoRA file brings along, as name -> tensors.

    A1111's names are bundle_emb.NAME.KEY, with KEY as in the embedding's own file, such as string_to_param.* or
    emb_params; OneTrainer's keys are clip_l and clip_l_out.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := BUNDLED.fullmatch(key):
            found.setdefault(match[1], {})[match[2]] = tensor
    return found


def _by_layer(weights: Mapping[str, Tensor]) -> tuple[Tensors, list[str]]:
    """Group the tensors by layer; the second are the names of those without effect."""
    refuse_other_kinds(weights)
    idle = [key for key in weights if WITHOUT_EFFECT.fullmatch(key)]
    own = {key: tensor for key, tensor in weights.items() if not BUNDLED.fullmatch(key)}
    for key in idle:
        del own[key]
    names = split_names(own)
    if not names:
        raise ValueError(_what_it_is(weights))
    if strange := [key for key in own if key not in names]:
        raise ValueError(f"{_some(strange, 'tensors')} belong to no layer of a LoRA: not supported")
    tensors: Tensors = {}
    for key, (path, role) in names.items():
        if role in tensors.setdefault(path, {}):
            raise ValueError(f"layer {path} has a second {role}, {key}: get the file again")
        tensors[path][role] = _checked(key, own[key], role)
    alone = {path for path, found in tensors.items() if found.keys() <= {*SETTINGS}}
    if len(alone) == len(tensors):
        raise ValueError(_what_it_is(weights))
    idle += [key for key, (path, _) in names.items() if path in alone]
    return {path: found for path, found in tensors.items() if path not in alone}, idle


def _what_it_is(weights: Mapping[str, Tensor]) -> str:
    """Return the error message for a file without changes of layers."""
    shapes = shapes_of(weights)
    if any(BUNDLED.fullmatch(key) for key in weights):
        return f"this holds {_some(list(bundled_embeddings(weights)), 'embeddings')} and no LoRA: give a LoRA file"
    foreign = looks_like(shapes)
    if foreign and foreign.name == LORA:
        return f"none of its {_some(list(weights), 'tensors')} is of a kind of LoRA that is known here: not supported"
    known = foreign.name if foreign else "a complete model" if is_single_file(shapes) else ""
    return f"this is not a LoRA, {_some(list(weights), 'tensors')}{known and f', looks like {known}'}: give a LoRA file"


def _checked(key: str, tensor: Tensor, role: Role) -> Tensor:
    """Return a tensor of finite floats; 8-bit ones are widened, since little is computed in them."""
    if role in FLAGS and tensor.numel() != 1:
        raise ValueError(f"tensor {key} has shape {tuple(tensor.shape)}, expected one number: get the file again")
    if tensor.dtype in FP8:
        tensor = tensor.float()
    if tensor.dtype not in FLOATS and not (role in FLAGS and tensor.dtype in (torch.int32, torch.int64)):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"tensor {key} holds {kind}, expected {', '.join(FLOATS.values())}: convert it")
    if not tensor.isfinite().all():
        raise ValueError(f"tensor {key} holds NaN or infinity: this file is damaged, get it again")
    return tensor


def _check_places(tensors: Tensors, places: Mapping[str, Place]) -> dict[str, Family | None]:
    """Return the layers' families. Raises ValueError for layers that are foreign, incomplete, or occur twice."""
    if foreign := [path for path in tensors if path not in places]:
        model = next((name for path in foreign for name, mark in OTHER_MODELS.items() if mark.search(path)), None)
        raise _other_model(model, f"of its {len(tensors)} layers this one lacks {_some(foreign)}")
    families = {path: family_of(path, found) for path, found in tensors.items()}
    named: dict[tuple[Part, str], str] = {}
    for path in tensors:
        other = named.setdefault(places[path][:2], path)
        if other != path:
            raise ValueError(f"{other} and {path} are the same layer: give a file that holds each once")
    return families


def _changes(
    path: str, found: dict[Role, Tensor], family: Family | None, place: Place, settings: Mapping[str, Settings]
) -> list[LayerChange]:
    own = settings.get(place.prefix) if place.prefix is not None else None
    if (own or {}).get("use_dora") and not found.keys() & MAGNITUDES:
        raise ValueError(f"its metadata has use_dora, but layer {path} has no magnitudes: get the file again")
    scaled = (family is not None and family.rank is not None) or "up_bias" in found
    scale = _scale(path, found, family, place, settings) if scaled else Scale(1.0, 1)
    # LyCORIS multiplies its learned scalar into the factors whenever it writes them: where the scalar is in the file,
    # that was not done.
    by = float(found["scalar"].item()) if "scalar" in found else 1.0
    return list(changes_of(family, place, found, Scale(scale.alpha * by, scale.rank)))


def _scale(
    path: str, found: dict[Role, Tensor], family: Family | None, place: Place, settings: Mapping[str, Settings]
) -> Scale:
    rank = family.rank(found) if family and family.rank else 0
    if "alpha" in found:
        return Scale(float(found["alpha"].item()), rank) if rank else Scale(1.0, 1)
    if settings:
        if place.prefix is None or place.prefix not in settings:
            raise ValueError(f"its metadata states the alpha of some layers, but not of {path}: get the file again")
        return Scale(*alpha_by_settings(settings[place.prefix], place.name, rank))
    if f"{PEFT_PREFIX}." in path:
        raise ValueError(
            f"this is in peft's own form, whose alpha lies in adapter_config.json, and layer {path} has none: put that "
            "file next to this one, or give the folder that holds both"
        )
    return Scale(float(rank or 1), rank or 1)


def _fitted(changes: list[LayerChange], modules: Mapping[tuple[Part, str], Adaptable]) -> list[LayerChange]:
    """Check the shapes, and reshape LoRA's factors. Raises ValueError with the number of changes that do not fit."""
    fitted: list[LayerChange] = []
    misfits: list[tuple[LayerChange, str]] = []
    for change in changes:
        parameter = getattr(modules[change.part, change.name], change.parameter)
        if parameter is None:
            if not is_nothing(change):
                misfits.append((change, f"{change.name} has a change of its bias, which this layer lacks"))
            continue
        change = _reshaped(change, parameter)
        if reason := change.misfit(parameter):
            misfits.append((change, reason))
        fitted.append(change)
    if misfits:
        widths = {
            change.down.shape[1]
            for change, _ in misfits
            if isinstance(change, LoraLayer) and change.name.endswith("attn2.to_k")
        }
        model = CONTEXT_WIDTHS.get(widths.pop()) if len(widths) == 1 else None
        raise _other_model(model, f"{len(misfits)} of its {len(changes)} layers do not fit, as {misfits[0][1]}")
    return fitted


def _reshaped(change: LayerChange, parameter: Tensor) -> LayerChange:
    """Give a LoRA's factors the shape of a 1 x 1 convolution if they are those of a matrix, and the reverse."""
    if isinstance(change, DoraChange):
        return replace(change, base=_reshaped(change.base, parameter))
    if not isinstance(change, LoraLayer):
        return change
    shapes = factor_shapes(parameter, change.rank)
    if tuple(as_matrix(factor.shape) for factor in (change.down, change.up)) != tuple(map(as_matrix, shapes)):
        return change
    return replace(change, down=change.down.reshape(shapes[0]), up=change.up.reshape(shapes[1]))


def _other_model(name: str | None, problem: str) -> ValueError:
    looks = f" (looks like {name})" if name else ""
    return ValueError(f"this LoRA was made for another model{looks}: {problem}: give a LoRA for this model")


def _some(names: list[str], what: str = "") -> str:
    shown = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names)}{f' {what}' if what else ''} ({shown})"


def refuse_other_kinds(keys: Iterable[str]) -> None:
    """Raise ValueError, naming the kind, for a weight change of a family that is not read."""
    for key in keys:
        for kind, ending in OTHER_KINDS.items():
            if ending.search(key):
                raise ValueError(f"this is {kind}, by its tensor {key}: not supported, give a LoRA")
