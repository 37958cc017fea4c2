"""The configuration of ldm/train.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from ldm.config import BY_KIND
from ldm.denoisers import DenoiserConfig
from ldm.diffusion.objective import ObjectiveConfig
from ldm.diffusion.paths import EDMPath, PathConfig, RectifiedFlowPath
from ldm.inference.request import DrawRequest
from ldm.interop.diffusers_layout.scheduler import scheduler_config_json
from ldm.model.facts import ModelFacts
from ldm.samplers import sampler_named
from ldm.training.task import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The model to train. Latent channels and context width follow from the folders `vae` and `text`."""

    vae: str  # folder that holds vae/: a run of vae/train.py, or a complete model
    text: str  # folder that holds text_encoder/ and tokenizer/: a run of text/train.py, or a complete model
    denoiser: Annotated[DenoiserConfig, BY_KIND]
    start: str | None = None  # folder of a model or run whose denoiser to start from; None: random initialisation
    path: Annotated[PathConfig, BY_KIND]
    objective: ObjectiveConfig
    latents: Literal["sample", "mean"] = "sample"  # of the autoencoder's posterior: the training target
    caption_dropout: float = 0.1  # fraction of captions replaced by "", which guidance needs
    keep_latents: bool = False  # keep them in memory after the first epoch, if the data set fits

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"model.caption_dropout is {self.caption_dropout}, expected a fraction from 0 to 1")
        try:
            scheduler_config_json(self.path, self.objective.prediction)  # every preview writes it
        except ValueError as error:
            raise ValueError(f"model.objective: {error}") from error
        if self.objective.learned_variance and isinstance(self.path, RectifiedFlowPath | EDMPath):
            raise ValueError(
                f"model.objective.learned_variance needs discrete steps, and path {self.path.kind} has none: "
                "use scaled_linear_beta, or leave it out"
            )
        if self.objective.learned_variance and not self.denoiser.can_learn_variance:
            raise ValueError(
                f"model.objective.learned_variance is not for a denoiser of kind {self.denoiser.kind}, since no other "
                "program opens such a model: use a DiT, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """The contact sheet drawn during training: one row per prompt, always from the same noise."""

    prompts: tuple[str, ...]
    pictures: int = 4  # per prompt
    steps: int = 20
    scale: float = 4.0
    sampler: str = "dpmpp_2m"
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            sampler_named(self.sampler)
        except ValueError as error:
            raise ValueError(f"preview.sampler: {error}") from error
        if not self.prompts or self.pictures < 1:
            raise ValueError("preview.prompts and preview.pictures must each be at least one")
        if self.seed < 0:
            raise ValueError(f"preview.seed is {self.seed}, expected a number from 0 up: previews repeat their noise")
        try:
            for prompt in self.prompts:
                self.request(prompt).seeded(self.pictures)
        except ValueError as error:
            raise ValueError(f"preview.{error}") from error

    def request(self, prompt: str) -> DrawRequest:
        """Return what is drawn of one prompt: the first of `pictures`, of which picture i has seed + i."""
        return DrawRequest(prompt=prompt, steps=self.steps, scale=self.scale, sampler=self.sampler, seed=self.seed)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainingConfig):
    kind: Literal["denoiser"] = "denoiser"
    model: ModelConfig
    preview: PreviewConfig | None = None  # None: nothing is drawn during training

    def __post_init__(self) -> None:
        if self.preview is not None:
            try:
                facts = ModelFacts(path=self.model.path, learned_variance=self.model.objective.learned_variance)
                self.preview.request(self.preview.prompts[0]).check(facts)
            except ValueError as error:
                raise ValueError(f"preview: {error}") from error
        if self.model.objective.time_sampling == "importance" and self.engine.accumulation > 1:
            raise ValueError(
                f"engine.accumulation is {self.engine.accumulation}, but importance sampling learns from each full "
                "batch: set it to 1, or choose another model.objective.time_sampling"
            )
