"""Single-step samplers: each step evaluates the denoiser at its start, and some at one other point.

`invert` is not a sampler but DDIM backwards: from an image to the noise from which DDIM generates it.
"""

import math
from collections.abc import Callable

from torch import Tensor

from ldm.diffusion.nodes import Step, ddpm_mean, grid_steps, learned_log_variance, variance_range
from ldm.diffusion.paths import PathConfig
from ldm.samplers.steps import Denoise, Generators, Variance, add_noise, ancestral, ddim_step, node_between


def ddim(
    denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators, *, eta: float = 0.0
) -> Tensor:
    """DDIM: eta = 0 is the ODE, eta = 1 DDPM's posterior, and values between have the same marginals.

    Song et al. 2020 (arXiv 2010.02502), eq. 12.
    """
    for step in grid_steps(path, times):
        down, up = ancestral(step, eta)
        x = add_noise(ddim_step(x, denoise(x, step.start.t), step.start, down), up, generator)
    return x


def invert(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, *, iterations: int = 20) -> Tensor:
    """Find the x at times[0] from which `ddim` over the same times reaches this x at times[-1]. B x ...

    The inverse of a DDIM step is x_t = alpha x0_hat + (sigma / sigma') (x' - alpha' x0_hat), where x0_hat depends on
    the unknown x_t: it is solved by fixed-point iteration, starting from x'. One iteration is the usual inversion (Song
    et al. 2020, appendix F), which is approximate; more converge if the denoiser is smooth enough for the step.

    times must end above 0: at t = 0 there is no noise to follow back. Raises ValueError otherwise.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected 1 or more")
    if times[-1] <= 0:
        raise ValueError("times end at 0, where no noise is left to follow back: leave out the last one")
    for start, end in reversed(list(grid_steps(path, times))):
        found = x
        for _ in range(iterations):
            found = ddim_step(x, denoise(found, start.t), end, start)
        x = found
    return x


def ddpm(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """DDPM's ancestral sampling, x' drawn around the mean of q(x' | x, x0_hat), with its variance ("fixed small").

    Exact for data at a single point. Ho et al. 2020, section 3.2.
    """
    return ancestral_sampling(denoise, x, path, times, generator, lambda x, step: math.sqrt(variance_range(step)[0]))


def ddpm_large(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """DDPM with the variance that the forward step adds ("fixed large"), exact for data of pure noise.

    With many steps it equals `ddpm`. Ho et al. 2020, section 3.2.
    """
    return ancestral_sampling(denoise, x, path, times, generator, lambda x, step: math.sqrt(variance_range(step)[1]))


def ddpm_learned(
    denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators, *, variance: Variance
) -> Tensor:
    """DDPM with the variance that the network has learned, between the small and the large one.

    variance() returns its position at denoise's last evaluation, of x's shape, from about -1 (that of q(x' | x, x0)) to
    1 (that of the forward step). Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 15.
    """

    def deviation(x: Tensor, step: Step) -> Tensor:
        small, large = variance_range(step)
        return (learned_log_variance(variance(), math.log(small), math.log(large)) / 2).exp()

    return ancestral_sampling(denoise, x, path, times, generator, deviation)


def ancestral_sampling(
    denoise: Denoise,
    x: Tensor,
    path: PathConfig,
    times: Tensor,
    generator: Generators,
    deviation: Callable[[Tensor, Step], float | Tensor],
) -> Tensor:
    """Step by x' = mean of q(x' | x, x0_hat) + deviation n; a step to sigma' = 0 adds no noise."""
    for step in grid_steps(path, times):
        x_weight, x0_weight = ddpm_mean(step)
        mean = x_weight * x + x0_weight * denoise(x, step.start.t)
        x = add_noise(mean, deviation(x, step), generator) if step.end.sigma > 0 else mean
    return x


def lcm(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """x' = alpha' x0_hat + sigma' n: take x0_hat as it is, and add fresh noise at the next level.

    For consistency models, whose output is the end of the ODE. Song et al. 2023 (arXiv 2303.01469), algorithm 1; Luo
    et al. 2023 (arXiv 2310.04378). With other denoisers it returns means, not samples.
    """
    for step in grid_steps(path, times):
        x = add_noise(step.end.alpha * denoise(x, step.start.t), step.end.sigma, generator)
    return x


def heun(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """Heun's method in sigma / alpha: a DDIM step, corrected with the denoiser's output at its end.

    x' = DDIM(x, D) + alpha' (e^h - 1) / 2 (D' - D): the mean of both slopes, since e' - e = alpha' (D - D') / sigma'.
    Karras et al. 2022 (arXiv 2206.00364), algorithm 1. A step from alpha = 0 or to sigma = 0 is a DDIM step.
    """
    for step in grid_steps(path, times):
        x = heun_step(denoise, x, step)
    return x


def heun_step(denoise: Denoise, x: Tensor, step: Step) -> Tensor:
    """Take one step of Heun's method."""
    x0 = denoise(x, step.start.t)
    x = ddim_step(x, x0, *step)
    if math.isfinite(step.h):
        x = x + step.end.alpha * math.expm1(step.h) / 2 * (denoise(x, step.end.t) - x0)
    return x


def dpm2(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """The midpoint method in sigma / alpha, with the midpoint of its logarithm: DPM-Solver-2's nodes.

    x' = DDIM(x, D) + alpha' 2 sinh(h / 2) (D_m - D), as e_m - e = (D - D_m) alpha_m / sigma_m. Karras et al. 2022,
    algorithm 2 without churn; Lu et al. 2022 (arXiv 2206.00927), section 3.2. A step from alpha = 0 or to sigma = 0
    is a DDIM step.
    """
    for step in grid_steps(path, times):
        x = midpoint_step(denoise, x, path, step)
    return x


def dpm2_ancestral(
    denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators, *, eta: float = 1.0
) -> Tensor:
    """DPM2 with fresh noise: a step of `dpm2` to a lower noise level, then noise up to the step's own.

    k-diffusion's sample_dpm_2_ancestral.
    """
    for step in grid_steps(path, times):
        down, up = ancestral(step, eta)
        x = add_noise(midpoint_step(denoise, x, path, Step(step.start, down)), up, generator)
    return x


def midpoint_step(denoise: Denoise, x: Tensor, path: PathConfig, step: Step) -> Tensor:
    """Take one step of `dpm2`. The step's end need not lie on the path."""
    x0 = denoise(x, step.start.t)
    answer = ddim_step(x, x0, *step)
    if math.isfinite(step.h):
        middle = node_between(path, step, 0.5)
        x0_middle = denoise(ddim_step(x, x0, step.start, middle), middle.t)
        answer = answer + step.end.alpha * 2 * math.sinh(step.h / 2) * (x0_middle - x0)
    return answer


def dpmpp_2s_ancestral(
    denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators, *, eta: float = 1.0
) -> Tensor:
    """DPM-Solver++(2S) with fresh noise: step to a lower noise level with x0_hat at the midpoint, then add noise.

    Lu et al. 2022 (arXiv 2211.01095), algorithm 1 with r = 1/2. A step from alpha = 0 or to sigma = 0 is a DDIM step.
    """
    for step in grid_steps(path, times):
        down, up = ancestral(step, eta)
        x0 = denoise(x, step.start.t)
        if math.isfinite(step.h):
            middle = node_between(path, Step(step.start, down), 0.5)
            x0 = denoise(ddim_step(x, x0, step.start, middle), middle.t)
        x = add_noise(ddim_step(x, x0, step.start, down), up, generator)
    return x


def dpmpp_sde(
    denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators, *, eta: float = 1.0
) -> Tensor:
    """SDE-DPM-Solver++(2S): like dpmpp_2s_ancestral, but x also reaches the midpoint with fresh noise.

    k-diffusion's sample_dpmpp_sde with r = 1/2, after Lu et al. 2022 (arXiv 2211.01095), section 5. A step from
    alpha = 0 or to sigma = 0 is a DDIM step.
    """
    for step in grid_steps(path, times):
        x0 = denoise(x, step.start.t)
        if math.isfinite(step.h):
            middle = node_between(path, step, 0.5)
            down, up = ancestral(Step(step.start, middle), eta)
            x0 = denoise(add_noise(ddim_step(x, x0, step.start, down), up, generator), middle.t)
        down, up = ancestral(step, eta)
        x = add_noise(ddim_step(x, x0, step.start, down), up, generator)
    return x
