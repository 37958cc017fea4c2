"""CLIP text weights between open_clip and transformers, and the `text_encoder/` folder of a diffusers model.

transformers 5.6 took the prefix `text_model.` off CLIPTextModel's keys. Both forms are read; the prefixed
one, which versions 4 and 5 load, is written.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.files.messages import describe_misfit, some
from ldm.files.strict_json import read_json, write_json
from text.encoder import (
    LAYER_NORM_EPS,
    Hidden,
    OpenClipTextEncoder,
    TextEncoderConfig,
    TransformersTextEncoder,
)
from text.tokenizer import BOS_ID, EOS_ID

StateDict = Mapping[str, Tensor]
PREFIX = "text_model."

_OUTER = {  # open_clip -> transformers
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_INNER = {  # the same inside transformer.resblocks.N -> encoder.layers.N
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_QKV = ("q_proj", "k_proj", "v_proj")
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
# Parts of an open_clip model that the text encoder has no use for.
_NOT_TEXT = re.compile(r"visual\..*|logit_scale|logit_bias|attn_mask|text_projection(\.weight|\.bias)?")
_LIMITS = {"num_hidden_layers": 256, "hidden_size": 8192, "intermediate_size": 2**15, "max_position_embeddings": 4096}
_POSITION_IDS = "embeddings.position_ids"  # a constant buffer that old files hold


def open_clip_to_transformers(state_dict: StateDict) -> dict[str, Tensor]:
    """The weights of CLIPTextModel, prefixed, from an open_clip model or its text tower.

    Takes the keys of CLIP, of CustomTextCLIP (`text.`) and of TextTransformer, whose in_proj holds the rows
    of q, k and v one below the other. The projection into the joint space with images has no place in
    CLIPTextModel and is left out. Raises ValueError for keys that CLIP's text tower does not have.
    """
    tower = _without_prefix(state_dict, "text.")
    result: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in tower.items():
        block = _BLOCK.fullmatch(key)
        if key in _OUTER:
            result[PREFIX + _OUTER[key]] = value
        elif block and block[2] == "attn.in_proj":
            for name, part in zip(_QKV, value.chunk(3), strict=True):
                result[f"{PREFIX}encoder.layers.{block[1]}.self_attn.{name}.{block[3]}"] = part
        elif block and block[2] in _INNER:
            result[f"{PREFIX}encoder.layers.{block[1]}.{_INNER[block[2]]}.{block[3]}"] = value
        elif not _NOT_TEXT.fullmatch(key):
            unknown.append(key)
    if unknown:
        raise ValueError(f"not a text tower of open_clip's CLIP: {len(unknown)} unexpected ({some(unknown)})")
    return result


def transformers_to_open_clip(state_dict: StateDict) -> dict[str, Tensor]:
    """The weights of open_clip's text tower, but for `text_projection`, from CLIPTextModel's in either form.

    Raises ValueError for keys that CLIPTextModel does not have, or where one of q, k and v is missing.
    """
    outer = {ours: theirs for theirs, ours in _OUTER.items()}
    inner = {ours: theirs for theirs, ours in _INNER.items()}
    flat = flattened(state_dict)
    result: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in flat.items():
        layer = _LAYER.fullmatch(key)
        if key in outer:
            result[outer[key]] = value
        elif layer and layer[2] in inner:
            result[f"transformer.resblocks.{layer[1]}.{inner[layer[2]]}.{layer[3]}"] = value
        elif layer and layer[2] == "self_attn.q_proj":
            names = [f"encoder.layers.{layer[1]}.self_attn.{name}.{layer[3]}" for name in _QKV]
            if lost := [name for name in names if name not in flat]:
                raise ValueError(f"not the weights of a CLIPTextModel: {len(lost)} missing ({some(lost)})")
            result[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat([flat[n] for n in names])
        elif not layer or layer[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            unknown.append(key)
    if unknown:
        raise ValueError(f"not the weights of a CLIPTextModel: {len(unknown)} unexpected ({some(unknown)})")
    return result


def flattened(state_dict: StateDict) -> dict[str, Tensor]:
    """CLIPTextModel's weights as transformers 5.6 names them, without the `position_ids` of old files."""
    return {key: value for key, value in _without_prefix(state_dict, PREFIX).items() if key != _POSITION_IDS}


def text_encoder_from_weights(
    config: TextEncoderConfig, state_dict: StateDict, *, dtype: torch.dtype = torch.float32
) -> TransformersTextEncoder:
    """An encoder on the CPU with exactly these CLIPTextModel weights, prefixed or flattened.

    Tensors that have this precision already become its own, those of a file without being read. Raises ValueError
    that counts the keys missing, unexpected and mis-shaped and shows up to five of each.
    """
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        encoder = TransformersTextEncoder(config)
    given = flattened(state_dict)
    _check_fit(given, encoder.model.state_dict())
    encoder.model.load_state_dict({key: value.to("cpu", dtype) for key, value in given.items()}, assign=True)
    # The only tensor that no file holds: transformers keeps it as a non-persistent buffer.
    positions = torch.arange(config.context_length).expand((1, -1))
    encoder.model.embeddings.register_buffer("position_ids", positions, persistent=False)
    return encoder


def text_encoder_config_json(config: TextEncoderConfig, *, whole: bool = False) -> dict[str, Any]:
    """The content of text_encoder/config.json, as `save_text_encoder` ships the encoder: see there.

    whole: with the last layer, whether it is asked or not.
    """
    shipped = config if whole else _shipped(config)
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": shipped.bos_id,
        "eos_token_id": shipped.eos_id,
        "hidden_act": shipped.activation,
        "hidden_size": shipped.width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": shipped.intermediate_size,
        "layer_norm_eps": LAYER_NORM_EPS,
        "max_position_embeddings": shipped.context_length,
        "model_type": "clip_text_model",
        "num_attention_heads": shipped.heads,
        "num_hidden_layers": shipped.layers,
        "pad_token_id": shipped.pad_id,
        "projection_dim": shipped.projection_dim,
        "vocab_size": shipped.vocab_size,
    }


def read_text_encoder_config(content: Mapping[str, Any], hidden: Hidden = "last") -> TextEncoderConfig:
    """The configuration in a text_encoder/config.json; keys that do not change the network are ignored.

    Old files say eos 2, bos 0 and pad 1, ids that CLIP never used: they are read as CLIP's own, and the
    padding is then what the tokenizer's files say. Raises ValueError for anything but a CLIP text encoder.
    """
    if content.get("model_type") != "clip_text_model":
        raise ValueError(f"model_type is {content.get('model_type')!r}, not 'clip_text_model'")
    activation, eps = content.get("hidden_act", "quick_gelu"), content.get("layer_norm_eps", LAYER_NORM_EPS)
    if eps != LAYER_NORM_EPS:
        raise ValueError(f"layer_norm_eps={eps} is not supported; CLIP's is {LAYER_NORM_EPS}")
    vocab_size = _whole(content, "vocab_size")
    bos_id, eos_id = min(BOS_ID, vocab_size - 2), min(EOS_ID, vocab_size - 1)
    if content.get("eos_token_id", 2) != 2:
        bos_id, eos_id = _whole(content, "bos_token_id", bos_id), _whole(content, "eos_token_id")
    pad_id = _whole(content, "pad_token_id", eos_id)
    return TextEncoderConfig(
        width=_whole(content, "hidden_size"),
        layers=_whole(content, "num_hidden_layers"),
        heads=_whole(content, "num_attention_heads"),
        intermediate_size=_whole(content, "intermediate_size"),
        context_length=_whole(content, "max_position_embeddings"),
        vocab_size=vocab_size,
        activation=activation,
        hidden=hidden,
        projection_dim=None if content.get("projection_dim") is None else _whole(content, "projection_dim"),
        pad_id=eos_id if pad_id == 1 else pad_id,
        bos_id=bos_id,
        eos_id=eos_id,
    )


def save_text_encoder(
    encoder: TransformersTextEncoder | OpenClipTextEncoder,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write config.json and model.safetensors, which transformers and diffusers load as a CLIPTextModel.

    An encoder with `hidden="penultimate"` is shipped without its last layer, as Stable Diffusion 2 is. What
    is left gives the same context under `hidden="last"`, but not the same `pooled`, which that layer made.
    """
    weights = prefixed_weights(encoder)
    if _shipped(encoder.config).layers < encoder.config.layers:
        last = f"{PREFIX}encoder.layers.{encoder.config.layers - 1}."
        weights = {key: value for key, value in weights.items() if not key.startswith(last)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(text_encoder_config_json(encoder.config), folder / "config.json")
    tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def prefixed_weights(encoder: TransformersTextEncoder | OpenClipTextEncoder) -> dict[str, Tensor]:
    """An encoder's weights as those of CLIPTextModel, prefixed, whatever it is made of."""
    if isinstance(encoder, OpenClipTextEncoder):
        return open_clip_to_transformers(encoder.state_dict())
    return {PREFIX + key: value for key, value in encoder.model.state_dict().items()}


def load_text_encoder(folder: str | Path, hidden: Hidden = "last") -> TransformersTextEncoder:
    """Read a diffusers `text_encoder/` folder as data, on the CPU in float32.

    Leave `hidden` at "last" for Stable Diffusion 1 and for Stable Diffusion 2, whose folders lack the last
    layer; "penultimate" is for a complete OpenCLIP tower. Raises FileNotFoundError for a missing file,
    ValueError for a folder that holds no CLIP text encoder or whose weights and configuration disagree.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing; a text encoder's folder has config.json and model.safetensors"
            )
    content = read_json(folder / "config.json")
    try:
        config = read_text_encoder_config(content, hidden)
        return text_encoder_from_weights(config, load_file(folder / "model.safetensors"))
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from error


def _shipped(config: TextEncoderConfig) -> TextEncoderConfig:
    """The configuration under which a saved encoder is loaded again."""
    if config.hidden == "last":
        return config
    return replace(config, layers=config.layers - 1, hidden="last")


def _check_fit(given: StateDict, wanted: StateDict) -> None:
    shapes = [{key: tensor.shape for key, tensor in state.items()} for state in (wanted, given)]
    if misfit := describe_misfit(*shapes):
        raise ValueError(f"the weights do not fit the text encoder's configuration: {misfit}")


def _without_prefix(state_dict: StateDict, prefix: str) -> dict[str, Tensor]:
    result = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    if len(result) < len(state_dict):
        raise ValueError(f"some weights are there twice, with and without the prefix {prefix!r}")
    return result


def _whole(content: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = default if content.get(name) is None else content[name]
    limit = _LIMITS.get(name, 2**20)
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError(f"{name} in a text encoder's config.json must be a whole number up to {limit}, not {value!r}")
    return value
