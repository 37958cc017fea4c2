"""Everything around the denoiser: frozen autoencoder and text encoder, noise path, prediction.

B batch, C latent channels, h x w latents, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.diffusion import (
    PathConfig,
    Prediction,
    diffusion_loss,
    expand_times,
    noise_sample,
    prior_std,
    target,
    to_x0,
)
from ldm.guidance import classifier_free
from ldm.samplers import SAMPLERS, Denoise, noise_like, time_grid
from text import TextCondition, TextEncoder, Tokenizer
from vae import AutoencoderKL


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentDiffusion:
    """The frozen half of the model, and the rules by which any denoiser's output is understood."""

    vae: AutoencoderKL
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    path: PathConfig
    prediction: Prediction

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    @torch.no_grad()
    def condition(self, captions: Sequence[str]) -> TextCondition:
        """What the denoiser is told: context B x L x D, pooled B x D, mask B x L."""
        return self.text_encoder(self.tokenizer(captions).to(self.device))

    def seen(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_t as the network sees it, and its timesteps, B float32; t is () or B."""
        timesteps = self.path.timesteps(t).to(device=x_t.device, dtype=torch.float32).expand(len(x_t))
        return expand_times(self.path.input_scale(t), x_t) * x_t, timesteps

    def loss(
        self,
        network: Callable[..., Tensor],
        x0: Tensor,
        eps: Tensor,
        t: Tensor,
        captions: Sequence[str],
        *,
        added: Tensor | None = None,
    ) -> Tensor:
        """|| network(x_t, t, caption) - target ||^2 of each sample, B: what training minimises.

        x0 and eps B x C x h x w, t B on the CPU. network: a denoiser, or whatever computes one. added: the noise in
        x_t, where it is not eps, the noise in the target.
        """
        text = self.condition(captions)
        x_t = noise_sample(x0, eps if added is None else added, self.path, t)
        output = network(*self.seen(x_t, t), text.context, text.mask, text.pooled)
        return diffusion_loss(output, target(self.prediction, x0, eps, self.path, t))

    def denoise_with(self, denoiser: nn.Module, condition: TextCondition) -> Denoise:
        """The function denoise(x_t, t) -> x0_hat that samplers take; t is one time for the whole batch.

        x_t stays float32 whatever the network computes in: a sampler adds many small steps.
        """
        dtype = next(denoiser.parameters()).dtype

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            seen, timesteps = self.seen(x_t, t)
            context, pooled = condition.context.to(dtype), condition.pooled.to(dtype)
            output = denoiser(seen.to(dtype), timesteps, context, condition.mask, pooled)
            return to_x0(self.prediction, output.to(x_t.dtype), x_t, self.path, t)

        return denoise

    @torch.no_grad()
    def sample(
        self,
        denoise: Denoise,
        generators: Sequence[torch.Generator],
        *,
        size: tuple[int, int],
        sampler: str,
        steps: int,
    ) -> Tensor:
        """Latents of h x w = `size` from noise, image i drawn with generators[i] alone: B x C x h x w, float32."""
        times = time_grid(self.path, steps)
        shape = (len(generators), self.vae.config.latent_channels, *size)
        start = prior_std(self.path) * noise_like(torch.empty(shape, device=self.device), generators)
        return SAMPLERS[sampler].function(denoise, start, self.path, times, generators)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pixels, float32. Raises FloatingPointError if they are not numbers."""
        pixels = self.vae.decode(latents.to(next(self.vae.parameters()).dtype)).float()
        if not pixels.isfinite().all():
            raise FloatingPointError("the decoded picture holds NaN or infinity: compute in fp32")
        return pixels


def guided(
    model: LatentDiffusion, denoiser: nn.Module, prompts: Sequence[str], negative_prompts: Sequence[str], scale: float
) -> Denoise:
    """denoise(x_t, t) under classifier-free guidance, prompt i for image i."""
    with_prompt = model.denoise_with(denoiser, model.condition(prompts))
    without = model.denoise_with(denoiser, model.condition(negative_prompts))
    return classifier_free(with_prompt, without, scale)
