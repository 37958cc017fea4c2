"""Train a KL autoencoder: vae/train.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from data.loader import Batch
from ldm.diffusion import sample_randomness
from ldm.files.atomic import atomic_folder
from ldm.inference.contact_sheet import save_image, sheet, to_images
from ldm.interop.diffusers_layout.vae import save_vae
from ldm.training.session import Session
from ldm.training.task import Task, TrainingConfig
from vae.autoencoder import AutoencoderKL, AutoencoderKLConfig
from vae.losses import VAELoss, VAELossConfig, latent_statistics, psnr

GRID_PICTURES, GRID_COLUMNS = 32, 16
CHECKPOINT_PICTURES = 256  # the last ones of training, over which they are measured for a checkpoint
STATISTICS_PICTURES = 4096  # training images over which latents are measured, each of hundreds of numbers a channel


@dataclass(frozen=True, kw_only=True)
class VAETrainConfig(TrainingConfig):
    kind: Literal["vae"] = "vae"
    vae: AutoencoderKLConfig
    loss: VAELossConfig

    def __post_init__(self) -> None:
        if self.data.image_size % self.vae.factor:
            raise ValueError(
                f"data.image_size is {self.data.image_size}, not a multiple of the autoencoder's factor "
                f"{self.vae.factor}, which follows from the length of vae.block_out_channels: change either"
            )


class VAETask(Task[VAETrainConfig]):
    """|x - x_hat| + w_p d(x, x_hat) + w_KL KL(q(z|x) || N(0, I)): see VAELoss."""

    config_class = VAETrainConfig

    def __init__(self, session: Session[VAETrainConfig]) -> None:
        super().__init__(session)
        config = session.config
        side = config.data.image_size // config.vae.factor
        self.shape = (config.vae.latent_channels, side, side)
        session.seed()
        self.network = self.build()
        self.loss_function = VAELoss(config.loss).to(self.device)

    def build(self) -> AutoencoderKL:
        return AutoencoderKL(self.config.vae)

    def losses(self, network: Callable[..., Any], batch: Batch, step: int) -> dict[str, Tensor]:
        # Convolutions adopt their input's layout, and run faster in this one. The weights stay contiguous, because
        # DeepSpeed broadcasts and flattens only contiguous tensors.
        pixels = batch.pixels.to(self.device).contiguous(memory_format=torch.channels_last)
        noise = sample_randomness(self.config.run.seed, batch.positions, self.shape).eps
        reconstruction, posterior = network(pixels, noise.to(self.device))
        return self.loss_function(reconstruction, pixels, posterior)

    @torch.no_grad()
    def evaluate(self, network: AutoencoderKL) -> dict[str, float]:
        """Measure the mean PSNR of the reconstructions of the validation set."""
        found = []
        for batch in self.session.held_out():
            pixels = batch.pixels.to(self.device)
            found.append((batch, psnr(reconstruct(network, pixels), pixels)))
        return {"validation_psnr": self.session.collect(found).mean().item()}

    def summarize(self, measures: Mapping[str, float]) -> str:
        pictures = len(self.session.validation or ())
        return f"validation PSNR {measures['validation_psnr']:.2f} dB over {pictures} pictures"

    @torch.no_grad()
    def show(self, step: int, network: AutoencoderKL, path: Path) -> None:
        """Write a contact sheet of validation images above their reconstructions."""
        if self.session.validation is None or self.config.validation is None:
            return
        batch = next(iter(self.session.validation.once(self.config.validation.batch_size)))
        pixels = batch.pixels.to(self.device)
        shown = (pixels[:GRID_PICTURES], reconstruct(network, pixels)[:GRID_PICTURES])
        originals, reconstructions = (to_images(part) for part in shown)
        columns = min(GRID_COLUMNS, len(originals))
        cells: list[Image.Image] = []
        for start in range(0, len(originals) - columns + 1, columns):
            cells += originals[start : start + columns] + reconstructions[start : start + columns]
        save_image(sheet(cells, columns=columns), path)

    def measured(self, averaged: Callable[[], nn.Module], position: int) -> dict[str, Any]:
        """Measure the mean and standard deviation of the latents over the last batches, for readers of a checkpoint."""
        session, size = self.session, self.config.data.batch_size
        network: Any = averaged()
        last = range(max(0, position - math.ceil(CHECKPOINT_PICTURES / size)), position)
        pixels = (session.images.batch(number).pixels.to(self.device) for number in last)
        mean, std = latent_statistics(network, pixels, session.world.all_reduce)
        return {"latents": {"mean": mean, "std": std}}

    def complete(self, network: AutoencoderKL) -> None:
        """Measure the mean and standard deviation of the latents, and store them in the network's configuration."""
        session = self.session
        pixels = (batch.pixels.to(self.device) for batch in session.training_sample(STATISTICS_PICTURES))
        mean, std = latent_statistics(network, pixels, session.world.all_reduce)
        network.config = dataclasses.replace(self.config.vae, latent_mean=mean, latent_std=std)
        session.run.log(f"latents: mean {[round(m, 3) for m in mean]}, standard deviation {[round(s, 3) for s in std]}")

    def finish(self, network: AutoencoderKL) -> None:
        """Write the averaged weights to RUN/vae."""
        path = self.config.run.path / "vae"
        with atomic_folder(path) as folder:
            save_vae(network, folder)
        self.session.run.log(f"wrote {path}")


def reconstruct(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Encode to the posterior's mean and decode it: B x 3 x H x W."""
    return vae.decode_z(vae.posterior(pixels).mean)
