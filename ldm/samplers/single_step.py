"""Samplers that forget: each step looks at its own start, and perhaps at one point on the way."""

import math
from typing import TYPE_CHECKING, Literal, assert_never

from torch import Tensor

from ldm.samplers.steps import Denoise, Generators, Step, add_noise, ancestral, ddim_step, grid_steps, node_between

if TYPE_CHECKING:
    from ldm.diffusion import PathConfig


def ddim(
    denoise: Denoise, x: Tensor, path: "PathConfig", times: Tensor, generator: Generators, *, eta: float = 0.0
) -> Tensor:
    """DDIM: eta = 0 is the ODE, eta = 1 DDPM's posterior, and what lies between has the same marginals.

    Song et al. 2020 (arXiv 2010.02502), eq. 12.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected 0 (no noise) to 1 (DDPM's)")
    for step in grid_steps(path, times):
        down, up = ancestral(step, eta)
        x = add_noise(ddim_step(x, denoise(x, step.start.t), step.start, down), up, generator)
    return x


def euler_ancestral(denoise: Denoise, x: Tensor, path: "PathConfig", times: Tensor, generator: Generators) -> Tensor:
    """Euler's method with fresh noise at each step, which is DDIM with eta = 1 under another name."""
    return ddim(denoise, x, path, times, generator, eta=1.0)


Variance = Literal["fixed_small", "fixed_large"]


def ddpm_posterior(step: Step) -> tuple[float, float, float]:
    """Coefficients of x and x0 in the mean of q(x' | x, x0), and its standard deviation ("fixed small").

    With a = alpha / alpha' and b^2 = sigma^2 - a^2 sigma'^2: mean (a sigma'^2 x + alpha' b^2 x0) / sigma^2,
    variance b^2 sigma'^2 / sigma^2. Ho et al. 2020 (arXiv 2006.11239), eqs. 6-7; for any path and stride as
    in Kingma et al. 2021 (arXiv 2107.00630), appendix A.
    """
    start, end = step
    ratio, added = start.alpha / end.alpha, variance_added(step)
    x_share = ratio * end.sigma**2 / start.sigma**2
    x0_share = end.alpha * added / start.sigma**2
    return x_share, x0_share, math.sqrt(added) * end.sigma / start.sigma


def variance_added(step: Step) -> float:
    """b^2 of q(x | x') = N(a x', b^2): beta where the grid has every node. Ho et al. 2020, eq. 2."""
    start, end = step
    return start.sigma**2 - (start.alpha / end.alpha * end.sigma) ** 2


def ddpm(
    denoise: Denoise,
    x: Tensor,
    path: "PathConfig",
    times: Tensor,
    generator: Generators,
    *,
    variance: Variance = "fixed_small",
) -> Tensor:
    """DDPM's ancestral sampling, x' drawn around the mean of q(x' | x, x0_hat).

    fixed_small is right for data that are one point, fixed_large (b^2) for data that are pure noise; with many steps
    both are. Ho et al. 2020, section 3.2.
    """
    for step in grid_steps(path, times):
        x_share, x0_share, small = ddpm_posterior(step)
        match variance:
            case "fixed_small":
                deviation = small
            case "fixed_large":
                deviation = math.sqrt(variance_added(step)) if step.end.sigma > 0 else 0.0
            case _:
                assert_never(variance)
        x = add_noise(x_share * x + x0_share * denoise(x, step.start.t), deviation, generator)
    return x


def lcm(denoise: Denoise, x: Tensor, path: "PathConfig", times: Tensor, generator: Generators) -> Tensor:
    """x' = alpha' x0_hat + sigma' n: believe the answer whole, and make fresh noise of the next level.

    For consistency models, whose answer is where the ODE ends. Song et al. 2023 (arXiv 2303.01469), algorithm 1; Luo
    et al. 2023 (arXiv 2310.04378). From other denoisers it draws means, not data.
    """
    for step in grid_steps(path, times):
        x = add_noise(step.end.alpha * denoise(x, step.start.t), step.end.sigma, generator)
    return x


def heun(denoise: Denoise, x: Tensor, path: "PathConfig", times: Tensor, generator: Generators) -> Tensor:
    """Heun's method in sigma / alpha: a DDIM step, mended by what the denoiser says at its end.

    x' = DDIM(x, D) + alpha' (e^h - 1) / 2 (D' - D): the mean of both slopes, for e' - e = alpha' (D - D') / sigma'.
    Karras et al. 2022 (arXiv 2206.00364), algorithm 1. A step from alpha = 0 or to sigma = 0 is a DDIM step.
    """
    for step in grid_steps(path, times):
        x0 = denoise(x, step.start.t)
        x = ddim_step(x, x0, *step)
        if math.isfinite(step.h):
            x = x + step.end.alpha * math.expm1(step.h) / 2 * (denoise(x, step.end.t) - x0)
    return x


def dpm2(denoise: Denoise, x: Tensor, path: "PathConfig", times: Tensor, generator: Generators) -> Tensor:
    """The midpoint method in sigma / alpha, with the middle in its logarithm: DPM-Solver-2's nodes.

    x' = DDIM(x, D) + alpha' 2 sinh(h / 2) (D_m - D), for e_m - e = (D - D_m) alpha_m / sigma_m. Karras et al. 2022,
    algorithm 2 without churn; Lu et al. 2022 (arXiv 2206.00927), section 3.2. A step from alpha = 0 or to sigma = 0
    is a DDIM step.
    """
    for step in grid_steps(path, times):
        x0 = denoise(x, step.start.t)
        answer = ddim_step(x, x0, *step)
        if math.isfinite(step.h):
            middle = node_between(path, step, 0.5)
            x0_middle = denoise(ddim_step(x, x0, step.start, middle), middle.t)
            answer = answer + step.end.alpha * 2 * math.sinh(step.h / 2) * (x0_middle - x0)
        x = answer
    return x


def dpmpp_2s_ancestral(denoise: Denoise, x: Tensor, path: "PathConfig", times: Tensor, generator: Generators) -> Tensor:
    """DPM-Solver++(2S) with fresh noise: down to less noise than asked for by x0_hat at the middle, then up.

    Lu et al. 2022 (arXiv 2211.01095), algorithm 1 with r = 1/2. A step from alpha = 0 or to sigma = 0 is a DDIM step.
    """
    for step in grid_steps(path, times):
        down, up = ancestral(step, 1.0)
        x0 = denoise(x, step.start.t)
        if math.isfinite(step.h):
            middle = node_between(path, Step(step.start, down), 0.5)
            x0 = denoise(ddim_step(x, x0, step.start, middle), middle.t)
        x = add_noise(ddim_step(x, x0, step.start, down), up, generator)
    return x
