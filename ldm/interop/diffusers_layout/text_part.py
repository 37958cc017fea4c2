"""Read and write a model's text encoders, each with its tokenizer, in the folders of diffusers' layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.interop.network_files import TEXT_STEM, described_by, find_weights, read_config
from ldm.interop.weight_reader import Weights
from ldm.model.conditioner import TextTower
from text.conversion import TEXT_ENCODERS, TextEncoderKind, kind_of
from text.encoder import TextEncoderConfig
from text.tokenizer import Tokenizer

FOLDERS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
LIBRARY = "transformers"


@dataclass(frozen=True, slots=True)
class TextPart:
    """A text encoder and its tokenizer, opened: the weights are not read yet."""

    folder: Path
    kind: TextEncoderKind
    config: TextEncoderConfig
    tokenizer: Tokenizer
    weights: Weights

    def read(self, dtype: torch.dtype) -> TextTower:
        with described_by(self.folder):
            encoder = self.kind.build(self.config, self.weights.read(dtype), dtype=dtype)
        return TextTower(encoder, self.tokenizer)


def open_text_parts(folder: Path) -> list[TextPart]:
    """Open the model's text encoders. Raises ValueError or FileNotFoundError for what is not one of a known kind."""
    return [_open(folder / encoder, folder / tokenizer) for encoder, tokenizer in _present(folder)]


def _present(folder: Path) -> Sequence[tuple[str, str]]:
    return FOLDERS[: 1 + (folder / FOLDERS[1][0]).is_dir()]


def _open(folder: Path, tokenizer: Path) -> TextPart:
    source = folder / "config.json"
    content = read_config(source)
    with described_by(source):
        kind = kind_of(content)
        config = kind.read_config(content)
    found = find_weights(folder, TEXT_STEM)
    with described_by(found.source):
        weights = found.changed(kind.own_names)
    return TextPart(folder, kind, config, kind.load_tokenizer(tokenizer), weights)


def save_text_parts(towers: Sequence[TextTower], folder: Path, *, dtype: torch.dtype) -> None:
    """Write the text encoders and their tokenizers into a model's folder."""
    for (encoder, tokenizer), places in zip(towers, FOLDERS, strict=False):
        kind = TEXT_ENCODERS[encoder.kind]
        kind.save(encoder, folder / places[0], dtype=dtype)
        kind.save_tokenizer(tokenizer, folder / places[1])


def text_classes(kinds: Sequence[str]) -> dict[str, Any]:
    """Build the entries of model_index.json for text encoders of these kinds."""
    found: dict[str, Any] = {}
    for kind, (encoder, tokenizer) in zip(kinds, FOLDERS, strict=False):
        found[encoder] = [LIBRARY, TEXT_ENCODERS[kind].class_name]
        found[tokenizer] = [LIBRARY, TEXT_ENCODERS[kind].tokenizer_classes[0]]
    return found


def known_text_classes() -> dict[str, list[list[str]]]:
    """Map each folder to the classes that are read from it."""
    kinds = TEXT_ENCODERS.values()
    encoders = [[LIBRARY, kind.class_name] for kind in kinds]
    tokenizers = [[LIBRARY, name] for kind in kinds for name in kind.tokenizer_classes]
    return {name: classes for names in FOLDERS for name, classes in zip(names, (encoders, tokenizers), strict=True)}
