"""What the layout of one kind of denoiser is: its folder, its config.json, and the pipeline that opens it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from ldm.denoisers import Denoiser, DenoiserConfig
from ldm.denoisers.contract import Channels

Config = TypeVar("Config", bound=DenoiserConfig)
VERSION = "0.30.0"  # of diffusers, whose form is written


@dataclass(frozen=True)
class Surroundings(Channels):
    """What a denoiser's configuration does not say of it: the model around it does."""

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
    """How denoisers of one kind of configuration are stored."""

    folder: ClassVar[str]  # that the pipelines look for
    classes: ClassVar[tuple[str, ...]]  # in config.json and model_index.json; the first is written
    library: ClassVar[str] = "diffusers"
    further_parts: ClassVar[dict[str, Any]] = {}  # of model_index.json

    @abstractmethod
    def to_json(self, config: Config, around: Surroundings) -> dict[str, Any]:
        """config.json, as the class writes it."""

    @abstractmethod
    def from_json(self, content: dict[str, Any], *, source: Path) -> tuple[Config, Surroundings]:
        """What a config.json says. Raises ValueError or KeyError for what this program does not compute."""

    @abstractmethod
    def pipeline(self, *, for_inpainting: bool) -> str:
        """The class that opens the folder of the model."""

    @abstractmethod
    def call_words(self, *, size: int, context_length: int, for_inpainting: bool) -> str:
        """Keywords that the pipeline's call needs for such a model, each after a comma, for the model card."""

    def other_names(self, network: Denoiser, config: Config) -> Mapping[str, str]:
        """Names that other programs' files give to its modules -> its own."""
        return {}
