"""The layout of denoisers without a class in diffusers: denoiser/, whose config.json is our own configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ldm.denoisers import DENOISERS, DenoiserConfig
from ldm.interop.diffusers_layout.layout import DenoiserLayout, Surroundings
from ldm.interop.network_files import check_whole_numbers

LIMITS = {"sample_size": 4096, "latent_channels": 256, "context_width": 8192}


class OwnLayout(DenoiserLayout[DenoiserConfig]):
    """The layout of any registered kind. Only this program opens it."""

    folder = "denoiser"
    classes = ("FoundryDenoiser",)
    library = "latent_foundry"

    def to_json(self, config: DenoiserConfig, around: Surroundings) -> dict[str, Any]:
        return {"_class_name": self.classes[0], "config": dataclasses.asdict(config)} | dataclasses.asdict(around)

    def from_json(self, content: dict[str, Any], *, source: Path) -> tuple[DenoiserConfig, Surroundings]:
        check_whole_numbers(content, LIMITS, source=source)
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content["config"].items()}
        kind = given.get("kind")
        if kind not in DENOISERS:
            raise ValueError(f"{source} describes a denoiser of kind {kind!r}, expected one of {sorted(DENOISERS)}")
        config: DenoiserConfig = DENOISERS[kind](**given)
        return config, Surroundings(**{field.name: content[field.name] for field in dataclasses.fields(Surroundings)})

    def pipeline(self, *, for_inpainting: bool) -> str:
        return "LatentFoundryPipeline"

    def call_words(self, *, size: int, context_length: int, for_inpainting: bool) -> str:
        return f", height={size}, width={size}"
