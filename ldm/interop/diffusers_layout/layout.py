"""The interface of a denoiser's layout: its folder, its config.json, and the pipeline that opens it; and our own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from ldm.denoisers import DENOISERS, Denoiser, DenoiserConfig
from ldm.denoisers.contract import Channels
from ldm.interop.network_files import check_whole_numbers

Config = TypeVar("Config", bound=DenoiserConfig)
VERSION = "0.30.0"  # of diffusers, whose format is written
OWN_LIMITS = {"sample_size": 4096, "latent_channels": 256, "context_width": 8192}  # of the keys of our own layout


@dataclass(frozen=True)
class Surroundings(Channels):
    """Properties of a denoiser that follow from the model around it, not from its own configuration."""

    sample_size: int  # side of the native latents
    latent_channels: int
    context_width: int
    concat_channels: int = 0
    learned_variance: bool = False

    @classmethod
    def of(cls, network: Denoiser, *, sample_size: int, context_width: int) -> Surroundings:
        return cls(
            sample_size, network.latent_channels, context_width, network.concat_channels, network.learned_variance
        )

    def build(self, config: DenoiserConfig) -> Denoiser:
        return config.build(
            latent_channels=self.latent_channels,
            context_width=self.context_width,
            concat_channels=self.concat_channels,
            learned_variance=self.learned_variance,
        )


class DenoiserLayout(ABC, Generic[Config]):
    """The storage format of denoisers with one kind of configuration."""

    folder: ClassVar[str]  # its name, which the pipelines look for
    classes: ClassVar[tuple[str, ...]]  # in config.json and model_index.json; the first is written
    library: ClassVar[str] = "diffusers"
    further_parts: ClassVar[dict[str, Any]] = {}  # additional entries of model_index.json

    @abstractmethod
    def to_json(self, config: Config, around: Surroundings) -> dict[str, Any]:
        """Build config.json, as the class writes it."""

    @abstractmethod
    def from_json(self, content: dict[str, Any], *, source: Path) -> tuple[Config, Surroundings]:
        """Parse config.json. Raises ValueError or KeyError for a network that this program does not support."""

    @abstractmethod
    def pipeline(self, *, for_inpainting: bool) -> str:
        """Return the name of the pipeline class that opens the model's folder."""

    @abstractmethod
    def call_words(self, *, size: int, context_length: int, for_inpainting: bool) -> str:
        """Return the keyword arguments that the pipeline needs for such a model, each after a comma, for the card."""

    def other_names(self, network: Denoiser, config: Config) -> Mapping[str, str]:
        """Map names of its modules in other programs' files to its own."""
        return {}


class OwnLayout(DenoiserLayout[DenoiserConfig]):
    """The layout of any registered kind, without a class in diffusers: config.json is our own configuration. Only this
    program opens it."""

    folder = "denoiser"
    classes = ("FoundryDenoiser",)
    library = "latent_foundry"

    def to_json(self, config: DenoiserConfig, around: Surroundings) -> dict[str, Any]:
        return {"_class_name": self.classes[0], "config": asdict(config)} | asdict(around)

    def from_json(self, content: dict[str, Any], *, source: Path) -> tuple[DenoiserConfig, Surroundings]:
        check_whole_numbers(content, OWN_LIMITS, source=source)
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content["config"].items()}
        kind = given.get("kind")
        if kind not in DENOISERS:
            raise ValueError(f"{source} describes a denoiser of kind {kind!r}, expected one of {sorted(DENOISERS)}")
        config: DenoiserConfig = DENOISERS[kind](**given)
        return config, Surroundings(**{field.name: content[field.name] for field in fields(Surroundings)})

    def pipeline(self, *, for_inpainting: bool) -> str:
        return "LatentFoundryPipeline"

    def call_words(self, *, size: int, context_length: int, for_inpainting: bool) -> str:
        return f", height={size}, width={size}"
