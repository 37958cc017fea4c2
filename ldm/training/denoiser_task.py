"""Train a text-to-image denoiser in the latents of a frozen autoencoder: ldm/train.py.

B batch, C latent channels, h x w latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.loader import Batch
from ldm.denoisers import Denoiser, choose_attention, describe_attention
from ldm.diffusion.importance import LossHistory
from ldm.diffusion.objective import by_quantile, draw_times
from ldm.diffusion.randomness import drop_captions, sample_randomness, spread_uniforms, training_noise
from ldm.inference.contact_sheet import save_image, sheet
from ldm.inference.pipeline import TextToImage
from ldm.interop.diffusers_layout.folder import write_folder
from ldm.interop.network_files import RUN_MODEL
from ldm.interop.ownership import inherited_files
from ldm.model.components import ModelComponents
from ldm.model.precision import dtype_of
from ldm.training.denoiser_config import TrainConfig
from ldm.training.denoiser_setup import LatentEncoder, frozen_half
from ldm.training.denoiser_start import check_same_half, start_from
from ldm.training.engine.distributed import Ranks
from ldm.training.session import Session
from ldm.training.task import Task

NOISE, POSTERIOR = 0, 1  # streams of random numbers, each a function of (seed, position) alone
HELD_OUT_SEED = 1_000_003  # noise and times of the held-out loss, the same for every run and step


class DenoiserTask(Task[TrainConfig]):
    """E w(t) || network(x_t, t, caption) - target ||^2, over pictures, times and noise."""

    config_class = TrainConfig

    def __init__(self, session: Session[TrainConfig]) -> None:
        super().__init__(session)
        config = session.config
        self.model = frozen_half(config, self.device, session.run.log)
        if session.run.checkpoints.all():
            check_same_half(config, self.model, session.run.log)
        size, factor = config.data.image_size, self.model.vae.config.factor
        if size % factor:
            raise ValueError(f"data.image_size is {size}, not a multiple of {factor}, the factor of {config.model.vae}")
        self.side = size // factor
        self.shape = (self.model.vae.config.latent_channels, self.side, self.side)
        session.seed()
        self.network = self.build()
        self.dtype = dtype_of(session.precision)  # of the matrix products
        choose_attention(self.network, self.device, self.dtype)
        if config.model.start is not None:
            start_from(self.network, config, self.model, config.model.start, session.run.log)
        sampled, bf16 = config.model.latents == "sample", self.dtype == torch.bfloat16
        self.encode = LatentEncoder(self.model.vae, keep=config.model.keep_latents, bf16=bf16, sample=sampled)
        length = self.model.conditioner.context_length
        session.images.count_cut(self.model.conditioner.cut_off, tokens=length)
        self.history = LossHistory() if config.model.objective.time_sampling == "importance" else None

    @classmethod
    def begins_with(cls, config: TrainConfig) -> tuple[Path | None, tuple[Path, ...]]:
        model = config.model
        return Path(model.start) if model.start else None, (Path(model.vae), Path(model.text))

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
        precision, images = self.session.precision, self.session.images.available
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
        objective, bf16 = self.config.model.objective, self.dtype == torch.bfloat16
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
        if preview is None:
            return
        pipe = TextToImage(self._components(network), name=self.config.run.name, weights_hash=f"step {step}")
        rows = [pipe.draw(preview.request(prompt), n=preview.pictures) for prompt in preview.prompts]
        images = [drawing.image for row in rows for drawing in row]
        save_image(sheet(images, columns=preview.pictures, labels=preview.prompts), path)

    def export(self, step: int, network: Denoiser) -> None:
        start, parts = self.begins_with(self.config)
        beside = inherited_files((*filter(None, [start]), *parts))
        write_folder(self._components(network), self.config.run.path / RUN_MODEL, dtype=torch.float32, beside=beside)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.history is None else self.history.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.history is not None:
            self.history.load_state_dict(state)

    def _components(self, network: Denoiser) -> ModelComponents:
        config, notes = self.config.model.denoiser, self.session.run.config_text
        return ModelComponents(model=self.model, denoiser=network, config=config, sample_size=self.side, notes=notes)


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
