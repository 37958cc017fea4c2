"""Measure an autoencoder's reconstruction quality, and the statistics of its latents."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from vae.autoencoder import AutoencoderKL


def psnr(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Compute each image's peak signal-to-noise ratio in dB, B: 10 log10(4 / MSE), pixels in [-1, 1] (clamped)."""
    error = (reconstruction.float().clamp(-1, 1) - pixels).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(4.0 / error.clamp(min=1e-12))


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, batches: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and standard deviation of z per channel, over batches of pixels.

    The variance includes the posterior's own: E[mu^2 + sigma^2] - E[mu]^2, that of a sampled z.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for pixels in batches:
        q = vae.posterior(pixels)
        mean, variance = q.mean.double(), q.logvar.double().exp()
        count += mean.numel() // mean.shape[1]
        total = total + mean.sum(dim=(0, 2, 3))
        squares = squares + (mean.square() + variance).sum(dim=(0, 2, 3))
    mean = total / count
    std = (squares / count - mean.square()).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
