"""Train a text-to-image denoiser in the latents of a frozen autoencoder: ldm/train.py.

B batch, C latent channels, h x w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from data.loader import Batch
from ldm.config import BY_KIND
from ldm.denoisers import Denoiser, DenoiserConfig, choose_attention, describe_attention
from ldm.diffusion.importance import LossHistory
from ldm.diffusion.objective import ObjectiveConfig, by_quantile, draw_times
from ldm.diffusion.paths import EDMPath, PathConfig, RectifiedFlowPath
from ldm.diffusion.randomness import drop_captions, sample_randomness, spread_uniforms, training_noise
from ldm.inference.contact_sheet import save_image, sheet
from ldm.inference.pipeline import TextToImage
from ldm.inference.request import DrawRequest
from ldm.interop.diffusers_layout.denoiser import layout_of, load_denoiser
from ldm.interop.diffusers_layout.folder import write_folder
from ldm.interop.diffusers_layout.scheduler import scheduler_config_json
from ldm.interop.diffusers_layout.vae import load_vae
from ldm.interop.network_files import RUN_MODEL, load_strictly, model_folder
from ldm.model.components import ModelComponents
from ldm.model.conditioner import Conditioner, TextTower
from ldm.model.facts import ModelFacts
from ldm.model.latent_diffusion import LatentDiffusion
from ldm.samplers import sampler_named
from ldm.training.engine.distributed import Ranks
from ldm.training.session import Session
from ldm.training.task import Task, TrainingConfig
from text.conversion import load_text_encoder
from text.tokenizer import load_tokenizer
from vae.autoencoder import AutoencoderKL, DiagonalGaussian


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
    preview: PreviewConfig

    def __post_init__(self) -> None:
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


NOISE, POSTERIOR = 0, 1  # streams of random numbers, each a function of (seed, position) alone
HELD_OUT_SEED = 1_000_003  # noise and times of the held-out loss, the same for every run and step


class DenoiserTask(Task[TrainConfig]):
    """E w(t) || network(x_t, t, caption) - target ||^2, over pictures, times and noise."""

    config_class = TrainConfig

    def __init__(self, session: Session[TrainConfig]) -> None:
        super().__init__(session)
        config = session.config
        self.model = frozen_half(config, self.device)
        size, factor = config.data.image_size, self.model.vae.config.factor
        if size % factor:
            raise ValueError(f"data.image_size is {size}, not a multiple of {factor}, the factor of {config.model.vae}")
        self.side = size // factor
        self.shape = (self.model.vae.config.latent_channels, self.side, self.side)
        session.seed()
        self.network = self.build()
        self.dtype = torch.bfloat16 if session.bf16 else torch.float32
        choose_attention(self.network, self.device, self.dtype)
        if config.model.start is not None:
            start_from(self.network, config, config.model.start)
        sampled = config.model.latents == "sample"
        self.encode = LatentEncoder(self.model.vae, keep=config.model.keep_latents, bf16=session.bf16, sample=sampled)
        self.history = LossHistory() if config.model.objective.time_sampling == "importance" else None

    def build(self) -> Denoiser:
        """Build a fresh denoiser. Raises ValueError for a network made for latents of another size."""
        config, native = self.config, self.config.model.denoiser.native_side
        if native not in (None, self.side):
            raise ValueError(
                f"model.denoiser.sample_size is {native}, but pictures of {config.data.image_size} pixels have latents "
                f"of {self.side} per side: set it to {self.side}"
            )
        return config.model.denoiser.build(
            latent_channels=self.model.vae.config.latent_channels,
            context_width=self.model.conditioner.width,
            learned_variance=config.model.objective.learned_variance,
        )

    def describe(self) -> list[str]:
        millions = sum(p.numel() for p in self.network.parameters()) / 1e6
        precision, images = self.session.precision, len(self.session.images)
        length = self.config.model.denoiser.attention_length(self.side)
        attention = describe_attention(self.device, length, self.dtype)
        return [f"{millions:.1f} M parameters, {images} pictures, {precision} on {self.device}", attention]

    def losses(self, network: Callable[..., Any], batch: Batch, step: int) -> dict[str, Tensor]:
        positions, seed, objective = batch.positions, self.config.run.seed, self.config.model.objective
        random = sample_randomness(seed * 2 + NOISE, positions, self.shape)
        x0 = self.encode(batch, sample_randomness(seed * 2 + POSTERIOR, positions, self.shape).eps)
        eps, added = training_noise(objective, random.eps, seed=seed, positions=positions)
        uniforms = spread_uniforms(
            objective.time_numbers, random.time_uniforms, positions, batch_size=self.config.data.batch_size, seed=seed
        )
        numbers = uniforms if self.history is None else self.history.numbers(uniforms)
        t = draw_times(objective, self.model.path, numbers)
        captions = drop_captions(batch.captions, random.drop_uniforms, self.config.model.caption_dropout)
        condition = self.model.conditioner(captions)
        found = self.model.losses(network, x0, eps.to(self.device), t, condition, added=added.to(self.device))
        weighted = found.weighted(objective, self.model.path, t)
        if self.history is not None:
            weighted = by_importance(weighted, numbers, positions, self.history, self.session.world)
        return {"loss": weighted.mean(), **by_quantile(found.error, uniforms)}

    @torch.no_grad()
    def evaluate(self, network: Denoiser) -> dict[str, float]:
        """Average the error over the validation set ("held_out_loss"), and over each quarter of the times.

        Noise and times are fixed and no caption is dropped. If training uses importance sampling of times, these are
        uniform.
        """
        objective, bf16 = self.config.model.objective, self.session.bf16
        encode = LatentEncoder(self.model.vae, keep=False, bf16=bf16)
        if objective.time_sampling == "importance":
            objective = replace(objective, time_sampling="uniform")
        found: list[tuple[Batch, Tensor]] = []
        for batch in self.session.held_out():
            x0 = encode.moments(batch).mean
            random = sample_randomness(HELD_OUT_SEED, batch.positions, self.shape)
            eps, t = random.eps.to(self.device), draw_times(objective, self.model.path, random.time_uniforms)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=bf16):
                condition = self.model.conditioner(batch.captions)
                errors = self.model.losses(network, x0, eps, t, condition).error
            found.append((batch, torch.stack([errors, random.time_uniforms.to(errors)], dim=1)))
        # Contiguous: over every second number, a mean is summed in another order.
        errors, uniforms = self.session.collect(found).T.contiguous()
        parts = {f"held_out_{name}": part for name, part in by_quantile(errors, uniforms).items() if len(part)}
        return {name: part.mean().item() for name, part in ({"held_out_loss": errors} | parts).items()}

    def summarize(self, measures: Mapping[str, float]) -> str:
        return f"held-out loss {measures['held_out_loss']:.4f}"

    def show(self, step: int, network: Denoiser, path: Path) -> None:
        """Write a contact sheet of the preview's prompts, one row each, from the same noise at every step."""
        preview = self.config.preview
        pipe = TextToImage(self._components(network), name=self.config.run.name, weights_hash=f"step {step}")
        rows = [pipe.draw(preview.request(prompt), n=preview.pictures) for prompt in preview.prompts]
        images = [drawing.image for row in rows for drawing in row]
        save_image(sheet(images, columns=preview.pictures, labels=preview.prompts), path)

    def export(self, step: int, network: Denoiser) -> None:
        write_folder(self._components(network), self.config.run.path / RUN_MODEL, dtype=torch.float32)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.history is None else self.history.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.history is not None:
            self.history.load_state_dict(state)

    def _components(self, network: Denoiser) -> ModelComponents:
        config, notes = self.config.model.denoiser, self.session.run.config_text
        return ModelComponents(model=self.model, denoiser=network, config=config, sample_size=self.side, notes=notes)


def frozen_half(config: TrainConfig, device: torch.device) -> LatentDiffusion:
    """Load the frozen autoencoder and text encoder from the folders named in the configuration."""
    text = Path(config.model.text)
    encoder = load_text_encoder(text / "text_encoder").eval().requires_grad_(False).to(device)
    return LatentDiffusion(
        vae=load_vae(Path(config.model.vae) / "vae").eval().requires_grad_(False).to(device),
        conditioner=Conditioner(TextTower(encoder, load_tokenizer(text / "tokenizer"))),
        path=config.model.path,
        prediction=config.model.objective.prediction,
    )


def start_from(denoiser: Denoiser, config: TrainConfig, folder: str) -> None:
    """Load the weights of a model or run into a fresh denoiser. Raises ValueError if they are of another network."""
    source = model_folder(Path(folder)) / layout_of(config.model.denoiser).folder
    load_strictly(denoiser, load_denoiser(source).network.state_dict(), source=source)


def by_importance(
    losses: Tensor, numbers: Tensor, positions: Sequence[int], history: LossHistory, world: Ranks
) -> Tensor:
    """Divide the losses, B, by the density of their times; then record the losses of all ranks in the history."""
    weighted = losses / history.density(numbers).to(losses)
    columns = torch.tensor(positions), numbers, losses.detach().cpu()
    rows = torch.stack([column.double() for column in columns], dim=1)  # float32 counts only to 2^24
    everywhere = world.gather(rows.to(world.device)).cpu()
    _, seen, found = everywhere[everywhere[:, 0].argsort()].T
    if found.isfinite().all():  # otherwise the engine skips this batch
        history.record(seen, found)
    return weighted


class LatentEncoder:
    """Encode batches into latents, B x C x h x w: samples of the frozen autoencoder's posterior, or its means.

    Stable Diffusion samples. Means are the better target if the autoencoder left a channel unused: its samples there
    are pure noise, which nothing can predict.
    With `keep`, each image's mean and log-variance stay in memory after the first encoding (8 kB for a 16 x 16 x 4
    latent). Without it every visit encodes again, as large data sets need.
    """

    def __init__(self, vae: AutoencoderKL, *, keep: bool, bf16: bool, sample: bool = True) -> None:
        self.vae, self.keep, self.bf16, self.sample = vae, keep, bf16, sample
        self.device = next(vae.parameters()).device
        self._kept: dict[tuple[int, int], Tensor] = {}  # (shard, index) -> mean and log-variance, 2C x h x w

    def __call__(self, batch: Batch, noise: Tensor) -> Tensor:
        """Return the latents of a batch. noise: standard normal, of their shape."""
        posterior = self.moments(batch)
        return posterior.sample(noise.to(self.device)) if self.sample else posterior.mean

    def moments(self, batch: Batch) -> DiagonalGaussian:
        if not self.keep:
            return self._encode(batch.pixels)
        missing = [row for row, sample in enumerate(batch.samples) if sample not in self._kept]
        if missing:
            # Encode the full batch: its size affects rounding, and the number of missing images depends on when this
            # process started.
            found = self._encode(batch.pixels)
            moments = torch.cat([found.mean, found.logvar], dim=1)
            self._kept |= {batch.samples[row]: moments[row].clone() for row in missing}
        return DiagonalGaussian.from_moments(torch.stack([self._kept[sample] for sample in batch.samples]))

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> DiagonalGaussian:
        pixels = pixels.to(self.device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            posterior = self.vae.encode(pixels)
        return DiagonalGaussian(posterior.mean.float(), posterior.logvar.float())
