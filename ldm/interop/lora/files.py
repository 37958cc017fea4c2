"""The files of a LoRA: the path itself, or those of a folder that diffusers or peft wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ldm.files.strict_json import read_json
from ldm.interop.lora.names import METADATA_KEY, PEFT_PREFIX
from ldm.interop.weight_reader import Weights, open_weights

STEMS = ("pytorch_lora_weights", "adapter_model")  # diffusers', peft's
PARTS = ("unet", "transformer", "text_encoder")  # folders, each with an adapter of peft
CONFIG = "adapter_config.json"


def lora_files(path: Path) -> list[Path]:
    """List the files of a LoRA's folder; a path that is no folder is returned as it is.

    Raises ValueError for a folder in which there is no such file, or more than one that it could be.
    """
    if not path.is_dir():
        return [path]
    found = [file for folder in (path, *(path / part for part in PARTS)) if (file := _usual_file(folder))]
    if found:
        return found[:1] if found[0].parent == path else found
    others = sorted(path.glob("*.safetensors"))
    if len(others) != 1:
        raise ValueError(
            f"{path} is a folder with {len(others)} safetensors files and none of the usual names of a LoRA's "
            f"({', '.join(f'{stem}.safetensors' for stem in STEMS)}): give the file itself"
        )
    return others


def _usual_file(folder: Path) -> Path | None:
    names = (f"{stem}.{kind}" for kind in ("safetensors", "bin") for stem in STEMS)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def open_lora(path: Path) -> Iterator[Weights]:
    """Open a LoRA's files. Peft's settings are in adapter_config.json next to its tensors: they become metadata."""
    for file in lora_files(path):
        weights, config = open_weights(file), file.with_name(CONFIG)
        in_pefts_form = any(f"{PEFT_PREFIX}." in key for key in weights.tensors)
        if METADATA_KEY not in weights.metadata and (in_pefts_form or path.is_dir()) and config.exists():
            settings = json.dumps(read_json(config))
            weights = replace(weights, metadata={**weights.metadata, METADATA_KEY: settings})
        yield weights
