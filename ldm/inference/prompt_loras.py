"""LoRAs that a prompt names: their files, and their effect on the weights while its pictures are drawn."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ldm.files.messages import did_you_mean, some
from ldm.interop.lora import merge_lora
from ldm.interop.lora.layers import adaptable_layers
from ldm.interop.read_model import lora_content
from ldm.model.components import ModelComponents
from text.prompt_syntax import LoraTag

SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")


class FoundLora(NamedTuple):
    """The file of a LoRA, and its strengths."""

    file: Path
    text_strength: float
    denoiser_strength: float

    def describe(self) -> str:
        """Return "name:0.8" or "name:0.8:0.6", as in a tag."""
        strengths = [self.text_strength, self.denoiser_strength]
        return ":".join([self.file.stem, *(f"{strength:g}" for strength in dict.fromkeys(strengths))])


class LoraFolders:
    """Finds LoRAs by name, a file's without its suffix, in folders and those below; the first one found counts."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders

    def find(self, tags: Sequence[LoraTag]) -> tuple[FoundLora, ...]:
        """Find the files of tags, but of those of strength 0; those that are not there are left out."""
        files = self._files() if tags else {}
        found = [FoundLora(files[tag.name], *tag[1:3]) for tag in tags if tag.name in files]
        return tuple(lora for lora in found if lora.text_strength or lora.denoiser_strength)

    def missing(self, tags: Sequence[LoraTag]) -> list[str]:
        """Describe, a line each, the tags whose files are not there."""
        files = self._files() if tags else {}
        return [f"{tag.written} {self._why(tag.name, files)}: left out" for tag in tags if tag.name not in files]

    def _files(self) -> dict[str, Path]:
        files: dict[str, Path] = {}
        for folder in self.folders:
            for path in sorted(folder.rglob("*")):
                if path.suffix in SUFFIXES and path.is_file():
                    files.setdefault(path.stem, path)
        return files

    def _why(self, name: str, files: dict[str, Path]) -> str:
        if not self.folders:
            return "in the prompt names a LoRA, and no folder of LoRAs is given with --lora-folder"
        near = did_you_mean(name, files)
        where = " and ".join(map(str, self.folders))
        return f"in the prompt names a LoRA that is not in {where}{f', did you mean {near}?' if near else ''}"


@contextmanager
def applied(parts: ModelComponents, loras: Sequence[FoundLora]) -> Iterator[None]:
    """Merge LoRAs into the weights, in float32 and rounded once, for as long as the context lasts.

    The weights themselves are set aside, not changed, so that they are the same bits afterwards, and also if a file is
    refused. Raises ValueError for one that is of another model.
    """
    encoder = parts.model.conditioner.encoders[0]
    kept: dict[nn.Parameter, torch.Tensor] = {}
    try:
        for lora in loras:
            layers, words = lora_content(parts, lora.file)
            if words:
                told = "brings embeddings, which a tag does not add: give it with --lora to use them"
                warnings.warn(f"{lora.file} {told}: {some(words)}", stacklevel=2)
            modules = adaptable_layers(parts.denoiser, encoder)
            for parameter in chain.from_iterable(
                modules[one.part, one.name].parameters(recurse=False) for one in layers
            ):
                if parameter not in kept:
                    kept[parameter] = parameter.data
                    parameter.data = parameter.data.to(torch.float32, copy=True)
            for part, strength in (("text_encoder", lora.text_strength), ("denoiser", lora.denoiser_strength)):
                own = [layer for layer in layers if layer.part == part]
                merge_lora(own, denoiser=parts.denoiser, text_encoder=encoder, strength=strength)
        for parameter, before in kept.items():
            parameter.data = parameter.data.to(before.dtype)
        yield
    finally:
        for parameter, before in kept.items():
            parameter.data = before
