"""The latent diffusion model without its denoiser: frozen autoencoder, conditioner, noise path and prediction.

B batch, C latent channels, h x w latents, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.denoisers import Condition, Denoiser, Output
from ldm.diffusion.learned_variance import bound_terms
from ldm.diffusion.objective import ObjectiveConfig, diffusion_loss, loss_weight
from ldm.diffusion.paths import EDMPath, PathConfig, RectifiedFlowPath, prior_std
from ldm.diffusion.predictions import Prediction, network_input, noise_sample, target, to_x0
from ldm.errors import NonFiniteError
from ldm.model.conditioner import Conditioner
from ldm.samplers import noise_like
from ldm.samplers.network_denoise import NetworkDenoise
from vae.autoencoder import AutoencoderKL

Network = Callable[[Tensor, Tensor, Condition], Output]  # a denoiser, or a function that calls one


class Losses(NamedTuple):
    """Per sample, B: || output - target ||^2, and the variational bound's term if a variance is learned."""

    error: Tensor
    bound: Tensor | None

    def weighted(self, objective: ObjectiveConfig, path: PathConfig, t: Tensor) -> Tensor:
        """Return w(t) error, plus lambda N bound for a learned variance: L_hybrid. Nichol & Dhariwal 2021, eq. 16."""
        simple = loss_weight(objective, path, t).to(self.error.device) * self.error
        if self.bound is None:
            return simple
        assert not isinstance(path, RectifiedFlowPath | EDMPath)
        return simple + objective.variance_weight * path.num_train_timesteps * self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentDiffusion:
    """The frozen part of the model, and the rules to interpret a denoiser's output."""

    vae: AutoencoderKL
    conditioner: Conditioner
    path: PathConfig
    prediction: Prediction

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    def losses(
        self, network: Network, x0: Tensor, eps: Tensor, t: Tensor, condition: Condition, *, added: Tensor | None = None
    ) -> Losses:
        """Compute the terms of the training loss, per sample.

        x0 and eps B x C x h x w, t B on the CPU. added: the noise in x_t if it differs from eps, the noise in the
        target.
        """
        x_t = noise_sample(x0, eps if added is None else added, self.path, t)
        output = network(*network_input(x_t, self.path, t), condition)
        error = diffusion_loss(output.prediction, target(self.prediction, x0, eps, self.path, t))
        if output.variance is None:
            return Losses(error, None)
        x0_hat = to_x0(self.prediction, output.prediction.detach().float(), x_t, self.path, t)
        return Losses(error, bound_terms(x0, x_t, x0_hat, output.variance.float(), self.path, t))

    def denoise_with(self, denoiser: Denoiser, condition: Condition) -> NetworkDenoise:
        return NetworkDenoise(denoiser, condition, self.prediction, self.path)

    def noise(self, generators: Sequence[torch.Generator], *, size: tuple[int, ...]) -> Tensor:
        """Draw standard normal noise B x C x h x w, h x w = `size`; image i uses only generators[i]."""
        shape = (len(generators), self.vae.config.latent_channels, *size)
        return noise_like(torch.empty(shape, device=self.device), generators)

    def prior(self, noise: Tensor, times: Tensor) -> Tensor:
        """Scale noise to a sample at times[0], from which a sampler starts without an initial image."""
        return prior_std(self.path, times[0].item()) * noise

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents to pixels, float32. Raises NonFiniteError if any is not finite."""
        pixels = self.vae.decode(latents.to(next(self.vae.parameters()).dtype)).float()
        if not pixels.isfinite().all():
            raise NonFiniteError("the decoded image contains NaN or infinity: compute in fp32")
        return pixels
