"""Asking denoisers directly."""

from __future__ import annotations

from torch import Tensor, nn

from ldm.denoisers import Condition, Denoiser


def ask(network: nn.Module, x: Tensor, t: Tensor, context: Tensor, mask: Tensor, pooled: Tensor) -> Tensor:
    """A denoiser's prediction; what x has beyond the latents' channels is the condition's `concat`."""
    assert isinstance(network, Denoiser)
    latents = network.latent_channels
    concat = x[:, latents:] if x.shape[1] > latents else None
    return network(x[:, :latents], t, Condition(context, mask, pooled, concat)).prediction
