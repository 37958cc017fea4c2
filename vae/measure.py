"""Measure an autoencoder's reconstruction quality, and the statistics of its latents."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from vae.autoencoder import AutoencoderKL


def psnr(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Compute each image's peak signal-to-noise ratio in dB, B: 10 log10(4 / MSE), pixels in [-1, 1] (clamped)."""
    error = (reconstruction.float().clamp(-1, 1) - pixels).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(4.0 / error.clamp(min=1e-12))


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKL, batches: Iterable[Tensor], all_reduce: Callable[[list[float]], list[float]] = lambda own: own
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and standard deviation of z per channel, over batches of pixels.

    The variance includes the posterior's own: E[mu^2 + sigma^2] - E[mu]^2, that of a sampled z. all_reduce: adds up the
    numbers of all ranks, each of which has batches of its own.
    """
    channels = vae.config.latent_channels
    sums = torch.zeros(2 * channels, dtype=torch.float64)
    count = 0
    for pixels in batches:
        q = vae.posterior(pixels)
        mean, variance = q.mean.double(), q.logvar.double().exp()
        count += mean.numel() // channels
        sums += torch.cat([part.sum(dim=(0, 2, 3)) for part in (mean, mean.square() + variance)]).cpu()
    count, *sums_of_all = all_reduce([count, *sums.tolist()])
    mean, square = torch.tensor(sums_of_all, dtype=torch.float64).div(count).chunk(2)
    return tuple(mean.tolist()), tuple((square - mean.square()).sqrt().tolist())
