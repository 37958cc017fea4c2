"""The frozen half of the model that a denoiser is trained for, and its latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from data.loader import Batch
from ldm.files.paths import user_path
from ldm.interop.read_model import read_text, read_vae
from ldm.model.conditioner import Conditioner
from ldm.model.latent_diffusion import LatentDiffusion
from ldm.training.denoiser_config import TrainConfig
from vae.autoencoder import AutoencoderKL, DiagonalGaussian


def frozen_half(config: TrainConfig, device: torch.device, log: Callable[[str], object]) -> LatentDiffusion:
    """Load the frozen autoencoder and text encoder that the configuration names. log: gets the steps of runs."""
    places = config.model.vae, config.model.text
    of_vae, of_text = (lambda words, place=place: log(f"{place}: {words}") for place in places)
    towers = read_text(user_path(config.model.text), dtype=torch.float32, report=of_text)
    vae = read_vae(user_path(config.model.vae), dtype=torch.float32, in_place_of=None, report=of_vae)
    for network in (vae, *(tower.encoder for tower in towers)):
        network.eval().requires_grad_(False).to(device)
    return LatentDiffusion(
        vae=vae,
        conditioner=Conditioner(*towers),
        path=config.model.path,
        prediction=config.model.objective.prediction,
    )


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
