"""Read a model from a folder or a single file, optionally with another autoencoder and with LoRAs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ldm.diffusion import Prediction
from ldm.interop.compvis.reading import read_single_file
from ldm.interop.compvis.standalone_vae import read_vae
from ldm.interop.diffusers_layout.denoiser import layout_of
from ldm.interop.diffusers_layout.folder import read_folder
from ldm.interop.lora import merge_lora, read_lora
from ldm.interop.network_files import RUN_MODEL, model_folder
from ldm.interop.weight_reader import open_weights
from ldm.model.components import ModelComponents


class Lora(NamedTuple):
    file: Path
    strength: float = 1.0


def read_model(
    path: Path,
    *,
    dtype: torch.dtype,
    vae: Path | None = None,
    lora: Sequence[Lora] = (),
    ema: bool = True,
    prediction: Prediction | None = None,
) -> ModelComponents:
    """Read a model in this precision, on the CPU: see ldm.TextToImage.load.

    LoRAs are merged in float32 and the result is rounded once; this needs up to twice the memory.
    """
    folder, wanted = model_folder(path), dtype
    dtype = torch.float32 if lora else wanted
    if folder.is_dir():
        parts = read_folder(folder, dtype=dtype, prediction=prediction)
    elif folder.exists():
        parts = read_single_file(path, dtype=dtype, ema=ema, prediction=prediction)
    else:
        raise FileNotFoundError(f"there is no model at {path}: give the folder or file of one")
    if vae is not None:
        other = read_vae(vae, dtype=dtype, in_place_of=parts.model.vae.config)
        parts = with_remark(replace(parts, model=replace(parts.model, vae=other)), f"autoencoder of {vae.name}")
    for file, strength in lora:
        add_lora(parts, file, strength)
        parts = with_remark(parts, f"LoRA {file.name} of strength {strength:g}")
    for network in parts.networks if lora else ():
        network.to(wanted)
    return parts


def add_lora(parts: ModelComponents, file: Path, strength: float) -> None:
    """Merge one file into the weights. Raises ValueError, with no weight changed, if it is of another model."""
    weights = open_weights(file)
    names = layout_of(parts.config).other_names(parts.denoiser, parts.config)
    encoder = parts.model.conditioner.encoders[0]
    layers = read_lora(
        weights.tensors,
        weights.metadata,
        denoiser=parts.denoiser,
        text_encoder=encoder,
        source=file,
        compvis_names=names,
    )
    merge_lora(layers, denoiser=parts.denoiser, text_encoder=encoder, strength=strength)


def with_remark(parts: ModelComponents, remark: str) -> ModelComponents:
    assert parts.origin is not None
    return replace(parts, origin=replace(parts.origin, remarks=(*parts.origin.remarks, remark)))


def model_name(path: Path) -> str:
    """Return the model's name for image metadata: the run, the folder, or the file without its suffix."""
    place = path.resolve()
    if place.is_file():
        return place.stem
    return place.parent.name if place.name == RUN_MODEL else place.name
