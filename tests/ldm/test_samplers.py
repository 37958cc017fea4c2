"""Samplers held to their declared order on Gaussian data, where denoiser and ODE solution are closed-form.

The grid matters: its steps in log(alpha / sigma) alternate 1 : 3, for on a smooth grid a multistep solver
that ignores the ratio of its steps still shows its full order.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import get_args

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from ldm import samplers
from ldm.diffusion.paths import LinearBetaPath, PathConfig, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.diffusion.predictions import to_x0
from ldm.samplers import SAMPLERS, Denoise, Step, ddpm_posterior, noise_like, time_grid

PATHS = [kind() for kind in get_args(PathConfig)]
DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
STOCHASTIC = [name for name, sampler in SAMPLERS.items() if sampler.stochastic]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
every_sampler = pytest.mark.parametrize("name", SAMPLERS)

MEAN, STD = 0.4, 0.6


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def ideal_denoiser(path: PathConfig, mean: float = MEAN, std: float = STD) -> Denoise:
    """E[x0 | x_t] for data N(mean, std^2)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)

    return denoise


def marginal(path: PathConfig, t: Tensor, z: Tensor) -> Tensor:
    """The ODE's solution for data N(MEAN, STD^2): each sample keeps its quantile z of the marginal."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    return alpha * MEAN + (alpha**2 * STD**2 + sigma**2).sqrt() * z


def half_log_snr(path: PathConfig, t: Tensor) -> Tensor:
    return (path.alpha(t) / path.sigma(t)).log()


def uneven(start: float, stop: float, steps: int) -> Tensor:
    """steps + 1 numbers whose differences alternate 1 : 3; steps is even."""
    weights = double(*[1.0, 3.0] * (steps // 2)).cumsum(0) / (2 * steps)
    return start + (stop - start) * torch.cat([double(0.0), weights])


def uneven_in_log_snr(path: PathConfig, start: float, stop: float, steps: int) -> Tensor:
    """Times from start to stop, uneven in log(alpha / sigma), which is inverted by bisection."""
    ends = half_log_snr(path, double(start, stop))
    wanted = uneven(ends[0].item(), ends[1].item(), steps)
    low, high = torch.zeros_like(wanted), torch.ones_like(wanted)
    for _ in range(60):
        middle = (low + high) / 2
        too_noisy = half_log_snr(path, middle) < wanted
        low, high = torch.where(too_noisy, low, middle), torch.where(too_noisy, middle, high)
    return torch.cat([double(start), high[1:-1], double(stop)])


def measured_order(errors: Sequence[float]) -> float:
    """Slope of log error between the two finest grids, each with twice the steps of the one before."""
    return math.log2(errors[-2] / errors[-1])


def ode_errors(name: str, path: PathConfig, grids: Sequence[Tensor]) -> list[float]:
    z = double(-1.5, -0.3, 0.8, 2.0).reshape(2, 1, 1, 2)
    errors = []
    for times in grids:
        start = marginal(path, times[0], z)
        x = SAMPLERS[name].function(ideal_denoiser(path), start, path, times, generators(0, 1))
        errors.append((x - marginal(path, times[-1], z)).abs().max().item())
    return errors


# --------------------------------------------------------------------------------------- order of convergence


@every_path
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_on_an_uneven_grid(name, path):
    grids = [uneven_in_log_snr(path, 0.98, 0.02, steps) for steps in (64, 128, 256)]
    assert measured_order(ode_errors(name, path, grids)) == pytest.approx(SAMPLERS[name].order, abs=0.1)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_from_pure_noise_to_data(name):
    """From alpha = 0 to sigma = 0, where log(alpha / sigma) is infinite at both ends.

    Steps shrink towards the ends. On a grid even in t the steps in the logarithm stay coarse there, however
    many there are, and DPM++ 2M shows 1.6 to 1.8: order 2 but for a logarithmic factor.
    """
    angles = [uneven(0.0, math.pi, steps) for steps in (64, 128, 256)]
    grids = [torch.cat([(1 + angle[:-1].cos()) / 2, double(0.0)]) for angle in angles]
    order = measured_order(ode_errors(name, RectifiedFlowPath(), grids))
    assert order == pytest.approx(SAMPLERS[name].order, abs=0.1)


@pytest.mark.parametrize("path", [LinearBetaPath(), ScaledLinearBetaPath()], ids=lambda path: path.kind)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_from_the_last_noise_level(name, path):
    grids = [uneven_in_log_snr(path, 1.0, 0.02, steps) for steps in (64, 128, 256)]
    assert measured_order(ode_errors(name, path, grids)) == pytest.approx(SAMPLERS[name].order, abs=0.1)


def moments(name: str, path: PathConfig, times: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Exact mean and variance of what a stochastic sampler draws on Gaussian data, without Monte Carlo.

    There everything is affine, so the picture is c + a x + sum_i b_i n_i. Pixel 0 carries the start x, pixel
    i the i-th noise, the last pixel neither: so c is the last pixel, and the others less c are a and the b_i.
    """
    drawn = 0

    def basis_noise(x: Tensor, _: Sequence[torch.Generator]) -> Tensor:
        nonlocal drawn
        drawn += 1
        return torch.nn.functional.one_hot(torch.tensor(drawn), x.shape[-1]).to(x).expand_as(x)

    start_mean, unit = marginal(path, times[0], double(0.0, 1.0))
    x = torch.full((1, 1, 1, len(times) + 1), start_mean.item(), dtype=torch.float64)
    x[..., 0] = unit
    with monkeypatch.context() as patch:
        patch.setattr(samplers, "noise_like", basis_noise)
        x = SAMPLERS[name].function(ideal_denoiser(path), x, path, times, []).flatten()
    assert drawn >= len(times) - 2
    return x[-1].item(), (x[:-1] - x[-1]).square().sum().item()


@every_path
@pytest.mark.parametrize("name", STOCHASTIC)
def test_weak_order_of_stochastic_samplers(name, path, monkeypatch):
    errors = []
    for steps in (64, 128, 256):
        mean, variance = moments(name, path, uneven_in_log_snr(path, 0.98, 0.02, steps), monkeypatch)
        exact_mean, upper = marginal(path, double(0.02), double(0.0, 1.0))
        errors.append(max(abs(mean - exact_mean), abs(variance - (upper - exact_mean) ** 2)).item())
    assert measured_order(errors) == pytest.approx(SAMPLERS[name].order, abs=0.1)


@every_path
@pytest.mark.parametrize("name", STOCHASTIC)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_stochastic_samplers_draw_the_data(name, path, seed):
    """Mean and variance within four standard errors, and the variance's own error at 1000 steps, 1.5%."""
    noise = noise_like(torch.empty(2, 1, 100, 200), generators(seed, seed + 100))
    times = time_grid(path, 1000)
    x = marginal(path, times[0], noise)
    x = SAMPLERS[name].function(ideal_denoiser(path), x, path, times, generators(seed + 200, seed + 300))
    n = x.numel()
    assert abs(x.mean() - MEAN) < 4 * STD / n**0.5
    assert abs(x.var() / STD**2 - 1) < 4 * (2 / n) ** 0.5 + 0.016


# ---------------------------------------------------------------------------------- against other derivations


@every_path
def test_ddpm_posterior_is_bayes_rule(path):
    """q(x' | x, x0) from the joint Gaussian of (x', x) given x0, by conditioning, for several strides."""
    times = double(1.0, 0.97, 0.5, 0.1, 0.001, 0.0)
    for t, t_next in pairwise(times):
        alpha, sigma, alpha_next, sigma_next = (f(u).item() for u in (t, t_next) for f in (path.alpha, path.sigma))
        ratio = alpha / alpha_next
        covariance = ratio * sigma_next**2  # of x = ratio x' + fresh noise, and x'
        gain = covariance / sigma**2
        x, x0 = 0.7, -1.3
        mean = alpha_next * x0 + gain * (x - alpha * x0)
        variance = sigma_next**2 - gain * covariance
        x_share, x0_share, deviation = ddpm_posterior(Step(t, alpha, sigma, alpha_next, sigma_next))
        assert x_share * x + x0_share * x0 == pytest.approx(mean, rel=1e-9, abs=1e-12)
        assert deviation**2 == pytest.approx(variance, rel=1e-6, abs=1e-15)


def linear_eps_model() -> Callable[[Tensor, Tensor], Tensor]:
    """A fixed random network: eps linear in x, with a gain that depends on the timestep."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) / 4

    def eps(x: Tensor, timestep: Tensor) -> Tensor:
        return (x.flatten(1) @ weight).reshape(x.shape) * torch.cos(timestep / 300) * 0.5 + 0.3 * x

    return eps


def our_picture(name: str, x: Tensor, path: PathConfig, times: Tensor, seeds: Sequence[int] = (0, 1)) -> Tensor:
    eps = linear_eps_model()

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return to_x0("eps", eps(x_t, path.timesteps(t).float()), x_t, path, t)

    return SAMPLERS[name].function(denoise, x, path, times, generators(*seeds))


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, numpy 2
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_deterministic_samplers_against_diffusers(name):
    schedulers = {
        "ddim": DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"),
        "dpmpp_2m": DPMSolverMultistepScheduler(
            **SD_BETAS,
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            final_sigmas_type="zero",
            timestep_spacing="trailing",
        ),
    }
    scheduler, path, eps = schedulers[name], ScaledLinearBetaPath(), linear_eps_model()
    scheduler.set_timesteps(20)
    times = time_grid(path, 20)
    assert torch.equal(path.timesteps(times[:-1]).long(), scheduler.timesteps)
    x = theirs = noise_like(torch.empty(2, 1, 4, 4), generators(5, 6))
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(eps(theirs, timestep), timestep, theirs, return_dict=False)[0]
    ours = our_picture(name, x, path, times)
    assert theirs.abs().max() > 0.5
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_ddpm_against_diffusers():
    scheduler, path, eps = (
        DDPMScheduler(**SD_BETAS, clip_sample=False, variance_type="fixed_small", timestep_spacing="trailing"),
        ScaledLinearBetaPath(),
        linear_eps_model(),
    )
    scheduler.set_timesteps(20)
    x = theirs = noise_like(torch.empty(1, 1, 4, 4), generators(5))
    (generator,) = generators(9)
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(eps(theirs, timestep), int(timestep), theirs, generator=generator, return_dict=False)[0]
    ours = our_picture("ddpm", x, path, time_grid(path, 20), [9])
    assert theirs.abs().max() > 0.5
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# --------------------------------------------------------------------------------------- contract of them all


@every_path
@every_sampler
def test_one_step_is_the_denoisers_answer(name, path):
    x = noise_like(torch.empty(2, 3, 4, 5), generators(1, 2))
    denoise = ideal_denoiser(path)
    answer = SAMPLERS[name].function(denoise, x, path, time_grid(path, 1), generators(1, 2))
    assert torch.allclose(answer, denoise(x, double(1.0)[0]).float(), atol=1e-6)
    assert answer.dtype == torch.float32 and answer.shape == x.shape


@every_path
@every_sampler
@pytest.mark.parametrize("start", [1.0, 0.6])
def test_picture_does_not_depend_on_its_batch(name, path, start):
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x * (1.5 - t) + x.mean(dim=(1, 2, 3), keepdim=True))

    times = time_grid(path, 7)
    times = times[times <= start]
    x = noise_like(torch.empty(3, 4, 6, 5), generators(10, 11, 12))
    together = SAMPLERS[name].function(denoise, x, path, times, generators(20, 21, 22))
    for i in range(3):
        alone = SAMPLERS[name].function(denoise, x[i : i + 1], path, times, generators(20 + i))
        assert torch.equal(alone[0], together[i])


@every_sampler
def test_generators_matter_only_where_stochastic(name):
    path, x = RectifiedFlowPath(), torch.ones(1, 1, 2, 2)
    pictures = [
        SAMPLERS[name].function(ideal_denoiser(path), x, path, time_grid(path, 5), generators(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2]) != SAMPLERS[name].stochastic


@every_sampler
def test_one_evaluation_at_each_node_but_the_last_and_inputs_left_alone(name):
    path, x, seen = ScaledLinearBetaPath(), torch.ones(2, 1, 2, 2), []
    times = time_grid(path, 6)
    copies = x.clone(), times.clone()

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        before = x_t.clone()
        answer = ideal_denoiser(path)(x_t, t)
        seen.append((t.item(), x_t, before, answer, answer.clone()))
        return answer

    SAMPLERS[name].function(denoise, x, path, times, generators(0, 1))
    assert [t for t, *_ in seen] == times[:-1].tolist()
    assert torch.equal(x, copies[0]) and torch.equal(times, copies[1])
    for _, x_t, x_before, answer, answer_before in seen:
        assert torch.equal(x_t, x_before) and torch.equal(answer, answer_before)


@every_path
@every_sampler
def test_a_thousand_steps_stay_finite(name, path):
    x = noise_like(torch.empty(1, 1, 2, 2), generators(0))
    for times in (time_grid(path, 1000), time_grid(path, 1000).float()):
        answer = SAMPLERS[name].function(ideal_denoiser(path), x, path, times, generators(0))
        assert answer.isfinite().all() and (answer - MEAN).abs().max() < 5 * STD


def test_noise_comes_from_each_images_generator():
    noise = noise_like(torch.empty(2, 3, 4, dtype=torch.bfloat16), generators(3, 4))
    assert noise.dtype == torch.bfloat16
    for row, generator in zip(noise, generators(3, 4), strict=True):
        assert torch.equal(row, torch.randn(3, 4, generator=generator).bfloat16())
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        noise_like(torch.empty(2, 3, 4), generators(0))


def test_labels_are_unique():
    assert len({sampler.label for sampler in SAMPLERS.values()}) == len(SAMPLERS)


# ------------------------------------------------------------------------------------------------- time grids


def test_grid_on_rectified_flow_is_even():
    assert time_grid(RectifiedFlowPath(), 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50, 999, 1000])
def test_grid_on_a_table_is_trailing_spacing(steps):
    scheduler = DDIMScheduler(**SD_BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    path = ScaledLinearBetaPath()
    times = time_grid(path, steps)
    assert torch.equal(path.timesteps(times[:-1]).long(), scheduler.timesteps[:steps])
    assert times[-1] == 0 and times.dtype == torch.float64


def test_impossible_grids_are_refused():
    path = ScaledLinearBetaPath()
    for steps, message in [(0, "not 0"), (1001, "steps 1001 is more")]:
        with pytest.raises(ValueError, match=message):
            time_grid(path, steps)
    x = torch.ones(1, 1, 2, 2)
    for times in (double(1.0), double(0.0, 1.0), double(0.5, 0.5, 0.0), double(1.5, 0.0), double(0.5, -0.1)):
        with pytest.raises(ValueError, match="times must"):
            SAMPLERS["euler"].function(ideal_denoiser(path), x, path, times, generators(0))
