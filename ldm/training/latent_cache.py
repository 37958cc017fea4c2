"""Encode training images into latents, and cache them in memory, since the autoencoder is frozen."""

from __future__ import annotations

import torch
from torch import Tensor

from data.loader import Batch
from vae.autoencoder import AutoencoderKL, DiagonalGaussian


class LatentEncoder:
    """Encode batches into latents, B x C x h x w: samples of the posterior, or its means.

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
