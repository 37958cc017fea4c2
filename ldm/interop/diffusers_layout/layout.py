"""The interface of a denoiser's layout: its folder, its config.json, and the pipeline that opens it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from ldm.denoisers import Denoiser, DenoiserConfig
from ldm.denoisers.contract import Channels

Config = TypeVar("Config", bound=DenoiserConfig)
VERSION = "0.30.0"  # of diffusers, whose format is written


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
