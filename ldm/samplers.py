"""Samplers: from noise to data along a path, given only a function denoise(x_t, t) -> x0_hat.

A sampler is a pure function `sampler(denoise, x, path, times, generator) -> x`:

    denoise     x_t (B x ...) and t (0-d, one of times) to x0_hat of x_t's shape; wrap it to show progress
    x           B x ..., a sample at times[0]; left as it is
    times       1-D, on the CPU, strictly falling within [0, 1], usually to 0; best float64
    generator   one CPU generator for each image, so that a picture does not depend on its batch; only
                stochastic samplers draw from it

Everything is written over (alpha, sigma), never over sigma / alpha: that is infinite at alpha = 0, where
rectified flow starts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ldm.diffusion import PathConfig

Denoise = Callable[[Tensor, Tensor], Tensor]
Generators = Sequence[torch.Generator]


class SamplerFunction(Protocol):
    def __call__(
        self, denoise: Denoise, x: Tensor, path: "PathConfig", times: Tensor, generator: Generators
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Sampler:
    function: SamplerFunction
    order: int  # error ~ (step size)^order: of the picture, or where stochastic of mean and variance
    stochastic: bool
    label: str  # the name in A1111 and in the metadata of its pictures


class Step(NamedTuple):
    """One step of the grid, from (t, alpha, sigma) to the node after it; sigma > 0 and alpha_next > 0."""

    t: Tensor
    alpha: float
    sigma: float
    alpha_next: float
    sigma_next: float


def time_grid(path: "PathConfig", steps: int) -> Tensor:
    """steps + 1 times, evenly from 1 to 0, float64, moved to the times that the path was trained at.

    On a table path this is "trailing" spacing, which starts at the last noise level. Lin et al. 2023
    (arXiv 2305.08891), section 3.3.
    """
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, not {steps}")
    times = path.snap(torch.arange(steps, -1, -1, dtype=torch.float64) / steps)
    if not (times[:-1] > times[1:]).all():
        raise ValueError(f"steps {steps} is more than the path has noise levels; use fewer")
    return times


def noise_like(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise of x's shape, image i from generator[i]; float32 from the CPU, then moved."""
    if len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for {len(x)} images; give one for each image")
    return torch.stack([torch.randn(x.shape[1:], generator=g, dtype=torch.float32) for g in generator]).to(x)


def ddim_step(x: Tensor, x0: Tensor, step: Step) -> Tensor:
    """x' = alpha' x0 + (sigma' / sigma) (x - alpha x0): keep the noise that x0 implies, at its new level.

    Song et al. 2020 (arXiv 2010.02502), eq. 12 with eta = 0; exact if x0 did not change along the way.
    """
    return step.alpha_next * x0 + (step.sigma_next / step.sigma) * (x - step.alpha * x0)


def ddim(denoise: Denoise, x: Tensor, path: "PathConfig", times: Tensor, generator: Generators) -> Tensor:
    """DDIM with eta = 0."""
    for step in _steps(path, times):
        x = ddim_step(x, denoise(x, step.t), step)
    return x


def ddpm_posterior(step: Step) -> tuple[float, float, float]:
    """Coefficients of x and x0 in the mean of q(x' | x, x0), and its standard deviation ("fixed small").

    With a = alpha / alpha' and b^2 = sigma^2 - a^2 sigma'^2: mean (a sigma'^2 x + alpha' b^2 x0) / sigma^2,
    variance b^2 sigma'^2 / sigma^2. Ho et al. 2020 (arXiv 2006.11239), eqs. 6-7; for any path and stride as
    in Kingma et al. 2021 (arXiv 2107.00630), appendix A.
    """
    ratio = step.alpha / step.alpha_next
    variance_added = step.sigma**2 - ratio**2 * step.sigma_next**2
    x_share = ratio * step.sigma_next**2 / step.sigma**2
    x0_share = step.alpha_next * variance_added / step.sigma**2
    return x_share, x0_share, math.sqrt(variance_added) * step.sigma_next / step.sigma


def ddpm(denoise: Denoise, x: Tensor, path: "PathConfig", times: Tensor, generator: Generators) -> Tensor:
    """DDPM's ancestral sampling, x' drawn from q(x' | x, x0_hat)."""
    for step in _steps(path, times):
        x_share, x0_share, deviation = ddpm_posterior(step)
        x = x_share * x + x0_share * denoise(x, step.t)
        if deviation > 0:
            x = x + deviation * noise_like(x, generator)
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, path: "PathConfig", times: Tensor, generator: Generators) -> Tensor:
    """DPM-Solver++(2M): a DDIM step with x0 carried on along its last change.

    D = x0_i + h_i / (2 h_{i-1}) (x0_i - x0_{i-1}), h the step in log(alpha / sigma). Lu et al. 2022 (arXiv
    2211.01095), algorithm 2. First order (D = x0_i) are the first step, which has no history; the second,
    where the first came from alpha = 0 and so was endless in h; and the last, where it goes to sigma = 0.
    """
    previous: tuple[Tensor, float] | None = None
    for step in _steps(path, times):
        x0 = denoise(x, step.t)
        h = _half_log_snr(step.alpha_next, step.sigma_next) - _half_log_snr(step.alpha, step.sigma)
        carried = x0
        if previous is not None and step.sigma_next > 0:
            x0_previous, h_previous = previous
            carried = x0 + h / (2 * h_previous) * (x0 - x0_previous)
        x = ddim_step(x, carried, step)
        previous = x0, h
    return x


def _half_log_snr(alpha: float, sigma: float) -> float:
    """lambda = log(alpha / sigma), with its limits."""
    if alpha == 0:
        return -math.inf
    return math.log(alpha / sigma) if sigma > 0 else math.inf


def _steps(path: "PathConfig", times: Tensor) -> Iterator[Step]:
    """The grid's steps in order."""
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must be two or more numbers in one row, not of shape {tuple(times.shape)}")
    if not (times[:-1] > times[1:]).all() or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times must fall strictly, from at most 1 to at least 0, not {times.tolist()}")
    alphas, sigmas = path.alpha(times).tolist(), path.sigma(times).tolist()
    for i in range(len(times) - 1):
        yield Step(times[i], alphas[i], sigmas[i], alphas[i + 1], sigmas[i + 1])


# DDIM, Euler's method on x / alpha (k-diffusion) and Euler's method for rectified flow are one and the
# same update between given nodes. Users look for either name, so both are here, and both are `ddim`.
SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(function=ddpm, order=1, stochastic=True, label="DDPM"),
    "ddim": Sampler(function=ddim, order=1, stochastic=False, label="DDIM"),
    "euler": Sampler(function=ddim, order=1, stochastic=False, label="Euler"),
    "dpmpp_2m": Sampler(function=dpmpp_2m, order=2, stochastic=False, label="DPM++ 2M"),
}
