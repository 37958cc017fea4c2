"""What a model's small files say of it, before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.interop.diffusers_layout.denoiser import ALL_LAYOUTS, read_denoiser_config
from ldm.interop.diffusers_layout.scheduler import read_scheduler
from ldm.interop.diffusers_layout.vae import open_vae
from ldm.interop.network_files import model_folder
from ldm.interop.read_model import model_name
from ldm.model.components import inpainting_channels
from ldm.model.facts import ModelFacts


def read_facts(path: Path) -> ModelFacts:
    """Read what the JSON files of a model's folder say of it; a single file says nothing before it is loaded.

    A file that is not there leaves its facts unknown: its absence is reported by whoever loads the model. Raises
    ValueError, naming the file, for one that is damaged or of another kind of model.
    """
    folder = model_folder(path)
    facts: dict[str, Any] = {"name": model_name(path)}
    if (scheduler := folder / "scheduler" / "scheduler_config.json").exists():
        facts["path"] = read_scheduler(scheduler)[0]
    networks = [file for layout in ALL_LAYOUTS if (file := folder / layout.folder / "config.json").exists()]
    if len(networks) != 1:
        return ModelFacts(**facts)
    config, around = read_denoiser_config(networks[0])
    facts["learned_variance"] = around.learned_variance
    if (folder / "vae" / "config.json").exists():
        vae = open_vae(folder / "vae")
        facts["native_size"] = around.sample_size * vae.config.factor
        facts["factor"] = vae.config.factor * config.stride
        facts["for_inpainting"] = around.concat_channels == inpainting_channels(vae)
    return ModelFacts(**facts)
