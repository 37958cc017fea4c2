"""The configurations of the training commands, and what may change while a run goes on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from data.config import DataConfig, HeldOutConfig, ReadingConfig
from ldm.config import BY_KIND, dump, parse, read_tree
from ldm.denoisers import DenoiserConfig
from ldm.diffusion import EDMPath, ObjectiveConfig, PathConfig, RectifiedFlowPath
from ldm.interop.diffusers_layout.scheduler import scheduler_config_json
from ldm.samplers import SAMPLERS, sampler_named, time_grid
from ldm.training.engine.config import EngineConfig, OptimConfig
from ldm.training.run import RunConfig
from text import TextEncoderConfig
from text.clip import ImageTowerConfig
from vae.autoencoder import AutoencoderKLConfig
from vae.losses import VAELossConfig

# How the same numbers are computed, by how many, in how much memory: any of it may change while a run goes on.
FREE_OF_ENGINE = tuple(
    f"engine.{key}"
    for key in ("zero_stage", "accumulation", "offload", "recompute", "save_in_background", "hang_seconds")
)
READING = {entry.name for entry in dataclasses.fields(ReadingConfig)}  # how shards are reached: no number depends on it


@dataclass(frozen=True, kw_only=True)
class VAETrainConfig:
    run: RunConfig
    data: DataConfig
    validation: HeldOutConfig
    vae: AutoencoderKLConfig
    loss: VAELossConfig
    optim: OptimConfig
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.data.image_size % self.vae.factor:
            raise ValueError(
                f"data.image_size is {self.data.image_size}, not a multiple of the autoencoder's factor "
                f"{self.vae.factor}, which the number of vae.block_out_channels makes: change either"
            )


@dataclass(frozen=True, kw_only=True)
class TextTrainConfig:
    run: RunConfig
    data: DataConfig
    validation: HeldOutConfig
    text: TextEncoderConfig
    image: ImageTowerConfig
    optim: OptimConfig
    shift: int = 4  # pixels by which a picture is moved, at most, when it is shown
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if self.text.projection_dim != self.image.embed_dim:
            raise ValueError(
                f"text.projection_dim ({self.text.projection_dim}) and image.embed_dim ({self.image.embed_dim}) "
                "are the width of one space: make them equal"
            )
        if self.image.image_size != self.data.image_size or self.shift < 0:
            raise ValueError(
                f"image.image_size ({self.image.image_size}) must equal data.image_size ({self.data.image_size}), and "
                f"shift ({self.shift}) must be 0 or more"
            )
        if self.engine.accumulation > 1:
            raise ValueError(
                f"engine.accumulation is {self.engine.accumulation}, but CLIP's loss compares all pictures of a batch "
                "with each other: set it to 1, or data.batch_size to a part"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained, upon what. Latent channels and context width follow from the two folders."""

    vae: str  # folder that holds vae/: a run of vae/train.py, or a whole model
    text: str  # folder that holds text_encoder/ and tokenizer/: a run of text/train.py, or a whole model
    denoiser: Annotated[DenoiserConfig, BY_KIND]
    start: str | None = None  # folder of a model, or of a run, whose denoiser training begins with; None: a fresh one
    path: Annotated[PathConfig, BY_KIND]
    objective: ObjectiveConfig
    latents: Literal["sample", "mean"] = "sample"  # of the autoencoder's posterior: what is learned
    caption_dropout: float = 0.1  # share of captions replaced by "", which guidance needs
    keep_latents: bool = False  # in memory after the first visit: for sets that fit

    def __post_init__(self) -> None:
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"model.caption_dropout is {self.caption_dropout}, expected a share from 0 to 1")
        try:
            scheduler_config_json(self.path, self.objective.prediction)  # every preview writes it
        except ValueError as error:
            raise ValueError(f"model.objective: {error}") from error
        if self.objective.learned_variance and isinstance(self.path, RectifiedFlowPath | EDMPath):
            raise ValueError(
                f"model.objective.learned_variance is that of a table's steps, and path {self.path.kind} has none: use "
                "scaled_linear_beta, or leave it out"
            )
        if self.objective.learned_variance and not self.denoiser.can_learn_variance:
            raise ValueError(
                f"model.objective.learned_variance is not for a denoiser of kind {self.denoiser.kind}, which no other "
                "program opens with it: use a DiT, or leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class PreviewConfig:
    """The sheet that is drawn while training: a row a prompt, always from the same noise."""

    prompts: tuple[str, ...]
    pictures: int = 4  # a prompt
    steps: int = 20
    scale: float = 4.0
    sampler: str = "dpmpp_2m"
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            sampler_named(self.sampler)
        except ValueError as error:
            raise ValueError(f"preview.sampler: {error}") from error
        if not self.prompts or self.pictures < 1 or self.steps < 1:
            raise ValueError("preview.prompts, preview.pictures and preview.steps need one at least")
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"preview.scale is {self.scale}, expected a number from 0 up (1 is no guidance)")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    run: RunConfig
    data: DataConfig
    validation: HeldOutConfig
    model: ModelConfig
    optim: OptimConfig
    preview: PreviewConfig
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        try:
            time_grid(self.model.path, self.preview.steps)
            SAMPLERS[sampler_named(self.preview.sampler)].check(learned=self.model.objective.learned_variance)
        except ValueError as error:
            raise ValueError(f"preview: {error}") from error
        if self.model.objective.time_sampling == "importance" and self.engine.accumulation > 1:
            raise ValueError(
                f"engine.accumulation is {self.engine.accumulation}, but importance sampling learns from each batch as "
                "a whole: set it to 1, or model.objective.time_sampling to another"
            )


def check_continues(then: str, now: str, *, same_shards: bool = False) -> None:
    """Raise ValueError, naming the key, if a run that began with one configuration cannot go on with another.

    Both are texts of `dump`. How long a run goes on (with it, where its learning rate falls), what it shows and how
    its data are held ready may change; what else the numbers depend on may not. A setting that did not exist when the
    run began had its default then. same_shards: they are known to hold the same, so they may lie elsewhere.
    """
    tree = read_tree(then)
    kind = VAETrainConfig if "vae" in tree else TextTrainConfig if "text" in tree else TrainConfig
    began = dump(parse(kind, tree, source="the configuration that this run began with"))
    trees = [read_tree(text) for text in (began, now)]
    before, after = (_leaves(_placeless(tree) if same_shards else tree) for tree in trees)
    for key in sorted(before):
        free = key != "run.seed" and key.split(".")[0] in ("run", "preview", "validation")
        free |= key in ("data.prefetch", "model.keep_latents") or key in FREE_OF_ENGINE
        free |= key.removeprefix("data.") in READING
        if before.get(key) != after.get(key) and not free:
            raise ValueError(
                f"{key} was {before.get(key)!r} when this run began and is {after.get(key)!r} now: "
                "set it back, or begin anew under another run.name"
            )


def _placeless(tree: Any) -> Any:
    """A configuration that does not say where its shards are."""
    data = tree["data"] | {"shards": None, "sets": [one | {"shards": None} for one in tree["data"]["sets"]]}
    return tree | {"data": data}


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of sections as {"section.key": value}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return found
