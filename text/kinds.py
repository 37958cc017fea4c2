"""The kinds of text encoders that a model's folder may hold: to add one, describe it in an entry of TEXT_ENCODERS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm.files.strict_json import read_json
from text.conversion import flattened, read_text_encoder_config, save_text_encoder, text_encoder_from_weights
from text.encoder import Hidden, TextEncoder, TextEncoderConfig
from text.tokenizer import Tokenizer, load_tokenizer, save_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderKind:
    """How to read and write text encoders of one kind, and their tokenizers."""

    class_name: str  # in transformers, as model_index.json has it
    tokenizer_classes: tuple[str, ...]  # likewise; the first is written
    read_config: Callable[..., TextEncoderConfig]  # (content of config.json, hidden)
    own_names: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # renames a file's weights for `build`
    build: Callable[..., TextEncoder]  # (config, weights, *, dtype)
    save: Callable[..., None]  # (encoder, folder, *, dtype)
    load_tokenizer: Callable[[Path], Tokenizer]
    save_tokenizer: Callable[[Tokenizer, Path], None]


# By TextEncoder.kind, which is the model_type of config.json.
TEXT_ENCODERS = {
    "clip_text_model": TextEncoderKind(
        class_name="CLIPTextModel",
        tokenizer_classes=("CLIPTokenizer", "CLIPTokenizerFast"),
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
