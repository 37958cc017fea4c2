"""Read and write denoisers in diffusers' layout: a folder with config.json and weights, in one of a few layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ldm.denoisers import Denoiser, DenoiserConfig, DiTConfig, UNetConfig
from ldm.interop.diffusers_layout.layout import DenoiserLayout, OwnLayout, Surroundings
from ldm.interop.diffusers_layout.pixart import PixArtLayout
from ldm.interop.diffusers_layout.unet import UNetLayout
from ldm.interop.network_files import WEIGHTS_STEM, described_by, fill, find_weights, read_config, write_network
from ldm.model.components import LoadedDenoiser

OWN = OwnLayout()
# A kind that is not listed here is stored in our own layout, which no other program opens.
LAYOUTS: dict[type[DenoiserConfig], DenoiserLayout[Any]] = {UNetConfig: UNetLayout(), DiTConfig: PixArtLayout()}
ALL_LAYOUTS = (*LAYOUTS.values(), OWN)


def layout_of(config: DenoiserConfig) -> DenoiserLayout[Any]:
    return LAYOUTS.get(type(config), OWN)


def denoiser_folder(config: DenoiserConfig) -> str:
    """Return the name of the folder that the pipelines look for."""
    return layout_of(config).folder


def save_denoiser(
    denoiser: Denoiser,
    config: DenoiserConfig,
    folder: Path,
    *,
    sample_size: int,
    context_width: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write config.json and the weights. sample_size: side of the latents that it was trained on."""
    around = Surroundings.of(denoiser, sample_size=sample_size, context_width=context_width)
    write_network(denoiser, layout_of(config).to_json(config, around), folder, dtype=dtype)


def load_denoiser(folder: Path, *, dtype: torch.dtype = torch.float32) -> LoadedDenoiser:
    """Read a denoiser's network and configuration. Raises ValueError for anything else."""
    found = open_denoiser(folder)
    fill(found.network, find_weights(folder, WEIGHTS_STEM), dtype=dtype)
    return found


def open_denoiser(folder: Path) -> LoadedDenoiser:
    """Build the denoiser of meta tensors, from config.json alone; its weights are loaded later."""
    source = folder / "config.json"
    config, around = read_denoiser_config(source)
    with described_by(source), torch.device("meta"):
        return LoadedDenoiser(around.build(config), config, around.sample_size, around.context_width)


def read_denoiser_config(source: Path) -> tuple[DenoiserConfig, Surroundings]:
    """Read a denoiser's config.json. Raises ValueError for another kind of network."""
    content = read_config(source)
    kind = content.get("_class_name")
    for layout in ALL_LAYOUTS:
        if kind in layout.classes:
            with described_by(source):
                return layout.from_json(content, source=source)
    known = " or ".join(layout.classes[0] for layout in LAYOUTS.values())
    raise ValueError(f"{source} describes {kind!r}, expected {known}: give a denoiser's folder")
