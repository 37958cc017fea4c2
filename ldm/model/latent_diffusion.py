"""Everything around the denoiser: frozen autoencoder and text encoder, noise path, prediction.

B batch, C latent channels, h x w latents, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.diffusion import (
    EDMPath,
    ObjectiveConfig,
    PathConfig,
    Prediction,
    RectifiedFlowPath,
    diffusion_loss,
    expand_times,
    loss_weight,
    noise_sample,
    prior_std,
    target,
    to_x0,
)
from ldm.diffusion.learned_variance import bound_terms
from ldm.errors import NonFiniteError
from ldm.samplers import Denoise, LearnedDenoise, noise_like
from text import TextCondition, TextEncoder, Tokenizer, chunk_count, encode_weighted
from vae import AutoencoderKL


class Losses(NamedTuple):
    """Of each sample, B: || output - target ||^2, and the bound's term for the variance, if one is learned."""

    error: Tensor
    bound: Tensor | None

    def weighted(self, objective: ObjectiveConfig, path: PathConfig, t: Tensor) -> Tensor:
        """w(t) error, and for a learned variance lambda N bound: L_hybrid. Nichol & Dhariwal 2021, eq. 16."""
        simple = loss_weight(objective, path, t).to(self.error.device) * self.error
        if self.bound is None:
            return simple
        assert not isinstance(path, RectifiedFlowPath | EDMPath)
        return simple + objective.variance_weight * path.num_train_timesteps * self.bound


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentDiffusion:
    """The frozen half of the model, and the rules by which any denoiser's output is understood."""

    vae: AutoencoderKL
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    path: PathConfig
    prediction: Prediction
    learned_variance: bool = False  # whether a denoiser has a second half of channels: see diffusion.learned_variance

    @property
    def device(self) -> torch.device:
        return next(self.vae.parameters()).device

    @torch.no_grad()
    def condition(self, captions: Sequence[str], weighting: str = "none") -> TextCondition:
        """What the denoiser is told: context B x L x D, pooled B x D, mask B x L. weighting: see text.weighting."""
        if weighting == "a1111":
            return encode_weighted(self.text_encoder, self.tokenizer, captions, self.device)
        return self.text_encoder(self.tokenizer(captions).to(self.device))

    def batches(self, captions: Sequence[str], weighting: str, *, largest: int) -> list[list[str]]:
        """The captions in order, in batches of so many at most that have equally long a context."""
        chunks = [1 if weighting == "none" else chunk_count(self.tokenizer, caption) for caption in captions]
        alike = [
            [caption for caption, _ in group]
            for _, group in groupby(zip(captions, chunks, strict=True), lambda c: c[1])
        ]
        return [group[start : start + largest] for group in alike for start in range(0, len(group), largest)]

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
    ) -> Losses:
        """The parts of what training minimises, of each sample.

        x0 and eps B x C x h x w, t B on the CPU. network: a denoiser, or whatever computes one. added: the noise in
        x_t, where it is not eps, the noise in the target.
        """
        text = self.condition(captions)
        x_t = noise_sample(x0, eps if added is None else added, self.path, t)
        output, share = self.halves(network(*self.seen(x_t, t), text.context, text.mask, text.pooled))
        error = diffusion_loss(output, target(self.prediction, x0, eps, self.path, t))
        if share is None:
            return Losses(error, None)
        x0_hat = to_x0(self.prediction, output.detach().float(), x_t, self.path, t)
        return Losses(error, bound_terms(x0, x_t, x0_hat, share.float(), self.path, t))

    def halves(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """A network's output, B x C or 2 C x h x w, as the prediction and, if it was learned, the variance's share."""
        if not self.learned_variance:
            return output, None
        prediction, share = output.chunk(2, dim=1)
        return prediction, share

    def denoise_with(self, denoiser: nn.Module, condition: TextCondition, beside: Tensor | None = None) -> Denoise:
        """The function denoise(x_t, t) -> x0_hat that samplers take; t is one time for the whole batch.

        x_t stays float32 whatever the network computes in: a sampler adds many small steps. beside: further channels
        that the network sees, B x c x h x w.
        """
        dtype = next(denoiser.parameters()).dtype
        context, pooled = condition.context.to(dtype), condition.pooled.to(dtype)
        last: tuple[Tensor, Tensor | None] | None = None  # x_t and its share: a sampler asks for both of one x_t

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            nonlocal last
            seen, timesteps = self.seen(x_t, t)
            seen = seen if beside is None else torch.cat([seen, beside], dim=1)
            output = denoiser(seen.to(dtype), timesteps, context, condition.mask, pooled).to(x_t.dtype)
            prediction, share = self.halves(output)
            last = x_t, share
            return to_x0(self.prediction, prediction, x_t, self.path, t)

        def share(x_t: Tensor, t: Tensor) -> Tensor:
            if last is None or last[0] is not x_t:
                denoise(x_t, t)
            assert last is not None and last[1] is not None
            return last[1]

        return LearnedDenoise(denoise, share) if self.learned_variance else denoise

    def noise(self, generators: Sequence[torch.Generator], *, size: tuple[int, ...]) -> Tensor:
        """Standard normal B x C x h x w, h x w = `size`, image i drawn with generators[i] alone."""
        shape = (len(generators), self.vae.config.latent_channels, *size)
        return noise_like(torch.empty(shape, device=self.device), generators)

    def prior(self, noise: Tensor, times: Tensor) -> Tensor:
        """What a sampler begins with at times[0] where there is no picture to begin with."""
        return prior_std(self.path, times[0].item()) * noise

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents -> pixels, float32. Raises NonFiniteError if they are not numbers."""
        pixels = self.vae.decode(latents.to(next(self.vae.parameters()).dtype)).float()
        if not pixels.isfinite().all():
            raise NonFiniteError("the decoded picture holds NaN or infinity: compute in fp32")
        return pixels
