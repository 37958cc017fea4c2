"""Convert CLIP text weights between open_clip and transformers; read and write diffusers' `text_encoder/` folder.

transformers 5.6 removed the prefix `text_model.` from CLIPTextModel's keys. Both forms are read; the prefixed form,
which versions 4 and 5 load, is written. To add another kind of text encoder, describe it in an entry of TEXT_ENCODERS.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.files.messages import describe_misfit, some
from ldm.files.strict_json import read_json, write_json
from ldm.files.writing import writing
from text.encoder import (
    LAYER_NORM_EPS,
    TRANSFORMERS_SIZES,
    Hidden,
    OpenClipTextEncoder,
    TextEncoder,
    TextEncoderConfig,
    TransformersTextEncoder,
    transformers_settings,
)
from text.tokenizer import BOS_ID, EOS_ID, Tokenizer, load_tokenizer, save_tokenizer

StateDict = Mapping[str, Tensor]
PREFIX = "text_model."

_OUTER = {  # open_clip -> transformers
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_INNER = {  # within transformer.resblocks.N -> encoder.layers.N
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_QKV = ("q_proj", "k_proj", "v_proj")
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)")
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
# Parts of an open_clip model that the text encoder does not use.
_NOT_TEXT = re.compile(r"visual\..*|logit_scale|logit_bias|attn_mask|text_projection(\.weight|\.bias)?")
_LIMITS = {"num_hidden_layers": 256, "hidden_size": 8192, "intermediate_size": 2**15, "max_position_embeddings": 4096}
_POSITION_IDS = "embeddings.position_ids"  # a constant buffer in old files


def open_clip_to_transformers(state_dict: StateDict) -> dict[str, Tensor]:
    """Convert the weights of an open_clip model or its text tower to CLIPTextModel's, prefixed.

    Accepts the keys of CLIP, CustomTextCLIP (`text.`) and TextTransformer, whose in_proj stacks the rows of q, k and v.
    The projection into the joint space with images is left out, because CLIPTextModel has none. Raises ValueError for
    keys that CLIP's text tower does not have.
    """
    result: dict[str, Tensor] = {}
    unknown: list[str] = []
    for key, value in _without_prefix(state_dict, "text.").items():
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
    """Convert CLIPTextModel's weights, in either form, to open_clip's text tower, without `text_projection`.

    Raises ValueError for keys that CLIPTextModel does not have, or if one of q, k and v is missing.
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
            if missing := [name for name in names if name not in flat]:
                raise ValueError(f"not the weights of a CLIPTextModel: {len(missing)} missing ({some(missing)})")
            result[f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}"] = torch.cat([flat[n] for n in names])
        elif not layer or layer[2] not in ("self_attn.k_proj", "self_attn.v_proj"):
            unknown.append(key)
    if unknown:
        raise ValueError(f"not the weights of a CLIPTextModel: {len(unknown)} unexpected ({some(unknown)})")
    return result


def flattened(state_dict: StateDict) -> dict[str, Tensor]:
    """Rename CLIPTextModel's weights as in transformers 5.6, and drop the `position_ids` of old files."""
    return {key: value for key, value in _without_prefix(state_dict, PREFIX).items() if key != _POSITION_IDS}


def text_encoder_from_weights(
    config: TextEncoderConfig, state_dict: StateDict, *, dtype: torch.dtype = torch.float32
) -> TransformersTextEncoder:
    """Build an encoder on the CPU with exactly these CLIPTextModel weights, prefixed or flattened.

    Tensors that already have this dtype are used without a copy; those of a mapped file are not read yet. Raises
    ValueError with the counts of missing, unexpected and mis-shaped keys, and up to five examples of each.
    """
    with torch.device("meta"):  # no memory or random numbers for weights that are replaced at once
        encoder = TransformersTextEncoder(config)
    given = flattened(state_dict)
    shapes = [{key: tensor.shape for key, tensor in state.items()} for state in (encoder.model.state_dict(), given)]
    if misfit := describe_misfit(*shapes):
        raise ValueError(f"the weights do not fit the text encoder's configuration: {misfit}")
    encoder.model.load_state_dict({key: value.to("cpu", dtype) for key, value in given.items()}, assign=True)
    # The only tensor not in the file: transformers keeps it as a non-persistent buffer.
    positions = torch.arange(config.context_length).expand((1, -1))
    encoder.model.embeddings.register_buffer("position_ids", positions, persistent=False)
    return encoder


def text_encoder_config_json(config: TextEncoderConfig, *, whole: bool = False) -> dict[str, Any]:
    """Build text_encoder/config.json for the encoder as `save_text_encoder` writes it.

    whole: include the last layer even if `hidden` is "penultimate".
    """
    content = transformers_settings(config if whole else saved_config(config)) | {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "model_type": TextEncoder.kind,
    }
    return dict(sorted(content.items()))


def read_text_encoder_config(content: Mapping[str, Any], hidden: Hidden = "last") -> TextEncoderConfig:
    """Read the configuration from a text_encoder/config.json; keys that do not change the network are ignored.

    Old files give eos 2, bos 0 and pad 1, ids that CLIP never used. They are read as CLIP's own; the padding id is then
    the one in the tokenizer's files. Raises ValueError for a value that CLIP does not have.
    """
    activation, eps = content.get("hidden_act", "quick_gelu"), content.get("layer_norm_eps", LAYER_NORM_EPS)
    if eps != LAYER_NORM_EPS:
        raise ValueError(f"layer_norm_eps={eps} is not supported; CLIP's is {LAYER_NORM_EPS}")
    vocab_size = _integer(content, "vocab_size")
    bos_id, eos_id = min(BOS_ID, vocab_size - 2), min(EOS_ID, vocab_size - 1)
    if content.get("eos_token_id", 2) != 2:
        bos_id, eos_id = _integer(content, "bos_token_id", bos_id), _integer(content, "eos_token_id")
    pad_id = _integer(content, "pad_token_id", eos_id)
    return TextEncoderConfig(
        **{ours: _integer(content, theirs) for theirs, ours in TRANSFORMERS_SIZES.items()},
        activation=activation,
        hidden=hidden,
        projection_dim=None if content.get("projection_dim") is None else _integer(content, "projection_dim"),
        pad_id=eos_id if pad_id == 1 else pad_id,
        bos_id=bos_id,
        eos_id=eos_id,
    )


def save_text_encoder(
    encoder: TransformersTextEncoder | OpenClipTextEncoder, folder: str | Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Write config.json and model.safetensors, which transformers and diffusers load as a CLIPTextModel.

    An encoder with `hidden="penultimate"` is saved without its last layer, as in Stable Diffusion 2. With
    `hidden="last"` the rest computes the same context, but not the same `pooled`, which the last layer computes.
    """
    weights = prefixed_weights(encoder)
    if saved_config(encoder.config).layers < encoder.config.layers:
        last = f"{PREFIX}encoder.layers.{encoder.config.layers - 1}."
        weights = {key: value for key, value in weights.items() if not key.startswith(last)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(text_encoder_config_json(encoder.config), folder / "config.json")
    tensors = {key: value.detach().to("cpu", dtype).contiguous() for key, value in weights.items()}
    path = folder / "model.safetensors"
    with writing(path):
        save_file(tensors, path, metadata={"format": "pt"})


def prefixed_weights(encoder: TransformersTextEncoder | OpenClipTextEncoder) -> dict[str, Tensor]:
    """Return an encoder's weights as CLIPTextModel's, prefixed, for either backend."""
    if isinstance(encoder, OpenClipTextEncoder):
        return open_clip_to_transformers(encoder.state_dict())
    return {PREFIX + key: value for key, value in encoder.model.state_dict().items()}


def saved_config(config: TextEncoderConfig) -> TextEncoderConfig:
    """Return the configuration with which the saved encoder is loaded again."""
    return config if config.hidden == "last" else replace(config, layers=config.layers - 1, hidden="last")


def _without_prefix(state_dict: StateDict, prefix: str) -> dict[str, Tensor]:
    result = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    if len(result) < len(state_dict):
        raise ValueError(f"some weights occur twice, with and without the prefix {prefix!r}")
    return result


def _integer(content: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = default if content.get(name) is None else content[name]
    value = int(value) if isinstance(value, float) and value.is_integer() else value  # other programs write 12.0
    limit = _LIMITS.get(name, 2**20)
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError(f"{name} in a text encoder's config.json must be an integer from 0 to {limit}, not {value!r}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderKind:
    """How to read and write text encoders of one kind, and their tokenizers."""

    class_name: str  # in transformers, as model_index.json has it
    tokenizer_classes: tuple[str, ...]  # likewise; the first is written
    modules: tuple[str, ...]  # that its parameters begin with: others in a file belong to no text encoder
    read_config: Callable[..., TextEncoderConfig]  # (content of config.json, hidden)
    own_names: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # renames a file's weights for `build`
    build: Callable[..., TextEncoder]  # (config, weights, *, dtype)
    save: Callable[..., None]  # (encoder, folder, *, dtype)
    load_tokenizer: Callable[[Path], Tokenizer]
    save_tokenizer: Callable[[Tokenizer, Path], None]


# The kinds that a model's folder may hold, by TextEncoder.kind, which is the model_type of config.json.
TEXT_ENCODERS = {
    "clip_text_model": TextEncoderKind(
        class_name="CLIPTextModel",
        tokenizer_classes=("CLIPTokenizer", "CLIPTokenizerFast"),
        modules=("embeddings.", "encoder.", "final_layer_norm."),
        read_config=read_text_encoder_config,
        own_names=flattened,
        build=text_encoder_from_weights,
        save=save_text_encoder,
        load_tokenizer=load_tokenizer,
        save_tokenizer=save_tokenizer,
    )
}


def kind_of(content: Mapping[str, Any]) -> TextEncoderKind:
    """Look up the kind of a text_encoder/config.json. Raises ValueError for an unknown one."""
    kind = content.get("model_type")
    if kind not in TEXT_ENCODERS:
        raise ValueError(f"model_type is {str(kind)[:60]!r}, not {' or '.join(map(repr, TEXT_ENCODERS))}")
    return TEXT_ENCODERS[str(kind)]


def load_text_encoder(folder: str | Path, hidden: Hidden = "last") -> TextEncoder:
    """Load a diffusers `text_encoder/` folder on the CPU in float32; nothing in it is executed.

    Leave `hidden` at "last" for Stable Diffusion 1 and for Stable Diffusion 2, whose folders lack the last layer;
    "penultimate" is for a complete OpenCLIP tower. Raises FileNotFoundError for a missing file; ValueError if the
    folder does not hold a known text encoder, or if weights and configuration disagree.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder / name} is missing; a text encoder's folder has config.json and model.safetensors"
            )
    content = read_json(folder / "config.json")
    try:
        kind = kind_of(content)
        weights = kind.own_names(load_file(folder / "model.safetensors"))
        return kind.build(kind.read_config(content, hidden), weights)
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: {error}") from error
