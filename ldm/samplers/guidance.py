"""Guidance: combine functions denoise(x_t, t) -> x0_hat into one.

Samplers do not depend on it: each of these functions turns denoisers into a denoiser, and they compose. `scale` is a
number, or a function of the time (0-d) that returns one; if it is 1, the second denoiser is not evaluated.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, assert_never, cast

import torch
from torch import Tensor

from ldm.samplers.steps import Denoise

Scale = float | Callable[[Tensor], float]
TINY = 1e-12  # for divisors that may be 0
Schedule = Literal["constant", "linear", "cosine"]


def classifier_free(denoise_cond: Denoise, denoise_uncond: Denoise, scale: Scale) -> Denoise:
    """x0_uncond + scale (x0_cond - x0_uncond). Ho & Salimans 2022 (arXiv 2207.12598), eq. 6, scale = 1 + w.

    eps, v and velocity are affine in x0 at fixed x_t and t, so guiding any of them with this scale is the same. A
    negative prompt replaces the empty prompt.
    """
    return _combined(denoise_cond, denoise_uncond, scale, lambda x0, change, s: x0 + (s - 1) * change)


def composed(denoisers: Sequence[Denoise], weights: Sequence[float], denoise_uncond: Denoise) -> Denoise:
    """x0_uncond + sum of w_i (x0_i - x0_uncond): a denoiser for several prompts at once, for classifier-free guidance.

    Liu et al. 2022 (arXiv 2206.01714), eq. 11, with the scale left to guidance.
    """

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        x0_uncond = denoise_uncond(x_t, t)
        x0 = x0_uncond
        for part, weight in zip(denoisers, weights, strict=True):
            x0 = x0 + weight * (part(x_t, t) - x0_uncond)
        return x0

    return denoise


def scheduled(kind: Schedule, scale: float) -> Scale:
    """Return the scale over time: linear and cosine rise from 1 at the noise, and their mean over t is this scale.

    scale - 1 is multiplied by 2 (1 - t), or by 1 + cos(pi t). Wang et al. 2024 (arXiv 2404.13040), section 4.
    """
    match kind:
        case "constant":
            return scale
        case "linear":
            return lambda t: 1 + (scale - 1) * 2 * (1 - t.item())
        case "cosine":
            return lambda t: 1 + (scale - 1) * (1 + math.cos(math.pi * t.item()))
        case _:
            assert_never(kind)


def autoguidance(denoise: Denoise, weaker: Denoise, scale: Scale) -> Denoise:
    """Guide away from a weaker denoiser of the same task: a smaller one, or one that was trained less.

    Karras et al. 2024 (arXiv 2406.02507), eq. 3: the formula of classifier-free guidance, without its loss of variety.
    """
    return classifier_free(denoise, weaker, scale)


def rescaled(denoise_cond: Denoise, denoise_uncond: Denoise, scale: Scale, share: float) -> Denoise:
    """classifier_free, rescaled by the fraction `share` to the standard deviation of the conditional x0.

    Large scales make images too bright. Lin et al. 2023 (arXiv 2305.08891), eqs. 15 and 16, rescale the network's
    output; here it is x0 for any prediction. Raises ValueError for a fraction outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the fraction of rescaling is {share}, expected 0 (none) to 1")

    def rule(x0: Tensor, change: Tensor, s: float) -> Tensor:
        guided = x0 + (s - 1) * change
        ratio = _per_sample(x0.flatten(1).std(1) / guided.flatten(1).std(1).clamp(min=TINY), x0)
        return torch.lerp(guided, ratio * guided, share)

    return _combined(denoise_cond, denoise_uncond, scale, rule)


def projected(
    denoise_cond: Denoise,
    denoise_uncond: Denoise,
    scale: Scale,
    *,
    parallel: float = 0.0,
    norm_limit: float | None = None,
    momentum: float = 0.0,
) -> Denoise:
    """Adaptive projected guidance: the part of guidance's change along x0_cond only saturates colours, so it is scaled
    by `parallel`; the norm of the change is limited to norm_limit, and `momentum` (usually negative) times the previous
    change is added at each step. Sadat et al. 2024 (arXiv 2410.02416), algorithm 1.

    With momentum it has state: create a new one for each sampling.
    """
    running: Tensor | None = None

    def rule(x0: Tensor, change: Tensor, s: float) -> Tensor:
        nonlocal running
        if momentum:
            change = running = change if running is None else momentum * running + change
        if norm_limit is not None:
            norm: Tensor = cast(Any, change.flatten(1)).norm(dim=1)
            change = change * _per_sample((norm_limit / norm).clamp(max=1), x0)
        along = _per_sample((change * x0).flatten(1).sum(1) / x0.flatten(1).square().sum(1).clamp(min=TINY), x0) * x0
        return x0 + (s - 1) * (change - along + parallel * along)

    return _combined(denoise_cond, denoise_uncond, scale, rule)


def within_interval(guided: Denoise, plain: Denoise, start: float, stop: float) -> Denoise:
    """Use guided at times start <= t <= stop, else plain, which saves the second evaluation there.

    At high noise guidance costs variety, at low noise it has no effect. Kynkäänniemi et al. 2024 (arXiv 2404.07724),
    section 3. Raises ValueError for an invalid interval of times.
    """
    if not 0 <= start <= stop <= 1:
        raise ValueError(f"the guidance interval is {start} to {stop}, expected 0 <= start <= stop <= 1")

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return guided(x_t, t) if start <= t <= stop else plain(x_t, t)

    return denoise


def _combined(
    denoise_cond: Denoise, denoise_uncond: Denoise, scale: Scale, rule: Callable[[Tensor, Tensor, float], Tensor]
) -> Denoise:
    """Return the denoiser that computes rule(x0_cond, x0_cond - x0_uncond, scale)."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        s = scale(t) if callable(scale) else scale
        x0 = denoise_cond(x_t, t)
        return x0 if s == 1 else rule(x0, x0 - denoise_uncond(x_t, t), s)

    return denoise


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Reshape B numbers to broadcast against x of shape B x ...."""
    return values.reshape(-1, *[1] * (x.ndim - 1))
