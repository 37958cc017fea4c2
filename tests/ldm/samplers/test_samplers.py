"""Samplers held to their declared order on Gaussian data, where denoiser and ODE solution are closed-form.

The grid matters: its steps in log(alpha / sigma) alternate 1 : 3, for on a smooth grid a multistep solver
that ignores the ratio of its steps still shows its full order.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor

from ldm.diffusion.paths import LinearBetaPath, PathConfig, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.diffusion.predictions import to_x0
from ldm.samplers import SAMPLERS, Denoise, Node, Step, ddpm_posterior, noise_like, time_grid
from ldm.samplers.single_step import ddim, ddpm, variance_added

DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
STOCHASTIC = [name for name, sampler in SAMPLERS.items() if sampler.stochastic]
# lcm is for consistency models: it draws means from any other denoiser.
DRAWS_DATA = [name for name in STOCHASTIC if name != "lcm"]
every_sampler = pytest.mark.parametrize("name", SAMPLERS)

MEAN, STD = 0.4, 0.6
GRIDS = (128, 256, 512)  # steps, each twice as many as before


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def ideal_denoiser(path: PathConfig, mean: float | Tensor = MEAN, std: float | Tensor = STD) -> Denoise:
    """E[x0 | x_t] for data N(mean, std^2)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t), path.sigma(t)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)

    return denoise


def marginal(path: PathConfig, t: Tensor, z: Tensor, mean: float | Tensor = MEAN, std: float | Tensor = STD) -> Tensor:
    """The ODE's solution for data N(mean, std^2): each sample keeps its quantile z of the marginal."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    return alpha * mean + (alpha**2 * std**2 + sigma**2).sqrt() * z


def half_log_snr(path: PathConfig, t: Tensor) -> Tensor:
    return (path.alpha(t) / path.sigma(t)).log()


def uneven(start: float, stop: float, steps: int) -> Tensor:
    """steps + 1 numbers whose differences alternate 1 : 3; steps is even."""
    weights = double(*[1.0, 3.0] * (steps // 2)).cumsum(0) / (2 * steps)
    return start + (stop - start) * torch.cat([double(0.0), weights])


def uneven_in_log_snr(path: PathConfig, steps: int, *, start: float = -2.5, stop: float = 2.5) -> Tensor:
    """Times between two values of lambda = log(alpha / sigma), uneven in it.

    The first step is cut finely at its beginning: methods that remember have nothing to remember there and take a
    DDIM step, whose error is of the second order and would hide theirs.
    """
    wanted = uneven(start, stop, steps)
    first = wanted[0] + (wanted[1] - wanted[0]) * double(*[4.0**-k for k in range(8, 0, -1)])
    return path.time_of_log_snr(2 * torch.cat([wanted[:1], first, wanted[1:]]))


def measured_order(errors: Sequence[float]) -> float:
    """Slope of log error between the two finest grids, each with twice the steps of the one before."""
    return math.log2(errors[-2] / errors[-1])


def ode_errors(name: str, path: PathConfig, grids: Sequence[Tensor]) -> list[float]:
    """The largest over several data sets at once, for the error of one may pass through zero between two grids."""
    z = double(-1.5, -0.3, 0.8, 2.0).reshape(2, 1, 1, 2)
    data = double(0.4, -0.3, 0.0).view(3, 1), double(0.6, 1.4, 0.2).view(3, 1)
    errors = []
    for times in grids:
        start = marginal(path, times[0], z, *data)
        x = SAMPLERS[name].function(ideal_denoiser(path, *data), start, path, times, generators(0, 1))
        errors.append((x - marginal(path, times[-1], z, *data)).abs().max().item())
    return errors


# --------------------------------------------------------------------------------------- order of convergence


def holds_its_order(name: str, errors: Sequence[float]) -> bool:
    """Some do better on Gaussian data, where terms of their error cancel; a wrong coefficient only makes it worse."""
    return measured_order(errors) >= SAMPLERS[name].order - 0.2


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_on_an_uneven_grid(name, path):
    assert holds_its_order(name, ode_errors(name, path, [uneven_in_log_snr(path, n) for n in GRIDS]))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_from_pure_noise_to_data(name):
    """From alpha = 0 to sigma = 0, where log(alpha / sigma) is infinite at both ends.

    Steps shrink towards the ends. On a grid even in t the steps in the logarithm stay coarse there, however
    many there are, and DPM++ 2M shows 1.6 to 1.8: order 2 but for a logarithmic factor.
    """
    angles = [uneven(0.0, math.pi, steps) for steps in GRIDS]
    grids = [torch.cat([(1 + angle[:-1].cos()) / 2, double(0.0)]) for angle in angles]
    # The DDIM steps at both ends take LMS a part of its fourth order.
    assert measured_order(ode_errors(name, RectifiedFlowPath(), grids)) >= min(SAMPLERS[name].order - 0.15, 3.4)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_from_the_last_noise_level(name):
    path = ScaledLinearBetaPath()
    start = half_log_snr(path, double(1.0)).item()
    errors = ode_errors(name, path, [uneven_in_log_snr(path, n, start=start) for n in GRIDS])
    assert holds_its_order(name, errors)


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
        patch.setattr("ldm.samplers.steps.noise_like", basis_noise)
        x = SAMPLERS[name].function(ideal_denoiser(path), x, path, times, []).flatten()
    assert drawn >= len(times) - 2
    return x[-1].item(), (x[:-1] - x[-1]).square().sum().item()


@pytest.mark.parametrize("name", DRAWS_DATA)
def test_weak_order_of_stochastic_samplers(name, path, monkeypatch):
    errors = []
    for n in (32, 64, 128):
        times = path.time_of_log_snr(2 * uneven(-1.0, 1.0, n))
        mean, variance = moments(name, path, times, monkeypatch)
        exact_mean, upper = marginal(path, times[-1], double(0.0, 1.0)).tolist()
        assert mean == pytest.approx(exact_mean, abs=1e-12)  # x0_hat is a martingale: its mean stays
        errors.append(abs(variance - (upper - exact_mean) ** 2))
    assert holds_its_order(name, errors)


@pytest.mark.parametrize("name", DRAWS_DATA)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_stochastic_samplers_draw_the_data(name, path, seed):
    """Mean and variance within four standard errors and the sampler's own error, which is below 2% of the variance."""
    noise = noise_like(torch.empty(2, 1, 100, 200), generators(seed, seed + 100))
    times = time_grid(path, 999 if SAMPLERS[name].order == 1 else 300, "log_snr")
    x = marginal(path, times[0], noise)
    x = SAMPLERS[name].function(ideal_denoiser(path), x, path, times, generators(seed + 200, seed + 300))
    n = x.numel()
    assert abs(x.mean() - MEAN) < 4 * STD / n**0.5 + 0.005
    assert abs(x.var() / STD**2 - 1) < 4 * (2 / n) ** 0.5 + 0.02


# ---------------------------------------------------------------------------------- against other derivations


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
        step = Step(Node(t, alpha, sigma), Node(t_next, alpha_next, sigma_next))
        x_share, x0_share, deviation = ddpm_posterior(step)
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


@every_sampler
def test_one_step_is_the_denoisers_answer(name, path):
    x = noise_like(torch.empty(2, 3, 4, 5), generators(1, 2))
    denoise = ideal_denoiser(path)
    answer = SAMPLERS[name].function(denoise, x, path, time_grid(path, 1), generators(1, 2))
    assert torch.allclose(answer, denoise(x, double(1.0)[0]).float(), atol=1e-6)
    assert answer.dtype == torch.float32 and answer.shape == x.shape


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
def test_each_node_but_the_last_is_evaluated_and_inputs_are_left_alone(name):
    path, x, seen = ScaledLinearBetaPath(), torch.ones(2, 1, 2, 2), []
    times = time_grid(path, 6)
    copies = x.clone(), times.clone()

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        before = x_t.clone()
        answer = ideal_denoiser(path)(x_t, t)
        seen.append((t.item(), x_t, before, answer, answer.clone()))
        return answer

    SAMPLERS[name].function(denoise, x, path, times, generators(0, 1))
    visited = [t for t, *_ in seen]
    if SAMPLERS[name].evaluations == 1:
        assert visited == times[:-1].tolist()
    else:  # but for the last step, which goes to sigma = 0
        assert set(times[:-1].tolist()) <= set(visited) and len(visited) == 6 * SAMPLERS[name].evaluations - 1
    assert torch.equal(x, copies[0]) and torch.equal(times, copies[1])
    for _, x_t, x_before, answer, answer_before in seen:
        assert torch.equal(x_t, x_before) and torch.equal(answer, answer_before)


@every_sampler
def test_many_steps_stay_finite(name, path):
    x = noise_like(torch.empty(1, 1, 2, 2), generators(0))
    for times in (time_grid(path, 250), time_grid(path, 250).float()):
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


def test_times_that_are_no_grid_are_refused():
    path, x = ScaledLinearBetaPath(), torch.ones(1, 1, 2, 2)
    for times in (double(1.0), double(0.0, 1.0), double(0.5, 0.5, 0.0), double(1.5, 0.0), double(0.5, -0.1)):
        with pytest.raises(ValueError, match="times must"):
            SAMPLERS["euler"].function(ideal_denoiser(path), x, path, times, generators(0))


# ------------------------------------------------------------------------------------------- one among others


def test_one_euler_serves_k_diffusion_and_flow():
    """On the same nodes: Euler on x / alpha in sigma / alpha, and Euler on x in the flow's time, to 1e-12."""
    path, times = RectifiedFlowPath(), double(0.98, 0.7, 0.65, 0.3, 0.02)
    start = double(0.3, -1.1).view(1, 1, 1, 2)
    denoise, x_flow, x_k = ideal_denoiser(path), start, start / (1 - times[0])
    for t, t_next in pairwise(times):
        velocity = (x_flow - denoise(x_flow, t)) / t
        x_flow = x_flow + (t_next - t) * velocity
        sigma, sigma_next = t / (1 - t), t_next / (1 - t_next)
        slope = (x_k - denoise(x_k * (1 - t), t)) / sigma
        x_k = x_k + (sigma_next - sigma) * slope
    ours = SAMPLERS["euler"].function(denoise, start, path, times, generators(0))
    assert torch.allclose(ours, x_flow, rtol=0, atol=1e-12)
    assert torch.allclose(ours, x_k * (1 - times[-1]), rtol=0, atol=1e-12)


def test_ddim_with_eta_1_is_ddpm(path):
    x, times = noise_like(torch.empty(2, 1, 4, 4), generators(1, 2)).double(), time_grid(path, 8, "log_snr")
    pictures = [
        function(ideal_denoiser(path), x, path, times, generators(5, 6))
        for function in (partial(ddim, eta=1.0), SAMPLERS["ddpm"].function, SAMPLERS["euler_ancestral"].function)
    ]
    assert torch.allclose(pictures[0], pictures[1], rtol=1e-9, atol=1e-9)
    assert torch.equal(pictures[0], pictures[2])


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_has_the_same_marginals_whatever_eta(eta, path, monkeypatch):
    """Song et al. 2020, lemma 1: if x0 were known, x' would have the forward process's mean and variance."""
    times = path.time_of_log_snr(2 * double(-1.0, 0.2, 1.0))
    mean, variance = 0.7, 0.0  # of x0: one point
    start_mean = path.alpha(times[0]).item() * mean
    x = torch.full((1, 1, 1, 4), start_mean, dtype=torch.float64)
    x[..., 0] += path.sigma(times[0]).item()
    drawn = 0

    def basis_noise(x: Tensor, _: Sequence[torch.Generator]) -> Tensor:
        nonlocal drawn
        drawn += 1
        return torch.nn.functional.one_hot(torch.tensor(drawn), 4).to(x).expand_as(x)

    monkeypatch.setattr("ldm.samplers.steps.noise_like", basis_noise)
    x = ddim(lambda x, t: torch.full_like(x, mean), x, path, times, [], eta=eta).flatten()
    variance = (x[:-1] - x[-1]).square().sum().item()
    assert x[-1].item() == pytest.approx(path.alpha(times[-1]).item() * mean, rel=1e-12)
    assert variance == pytest.approx(path.sigma(times[-1]).item() ** 2, rel=1e-9)


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_an_eta_that_cannot_be_is_refused(eta):
    path, x = RectifiedFlowPath(), torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match=f"eta is {eta}, expected 0"):
        ddim(ideal_denoiser(path), x, path, time_grid(path, 2), generators(0), eta=eta)


def test_ddpms_large_variance_is_that_of_the_forward_step():
    path = LinearBetaPath()
    for i in (1, 500, 999):
        start, end = (double((k + 1) / 1000)[0] for k in (i, i - 1))
        step = Step(*(Node(t, path.alpha(t).item(), path.sigma(t).item()) for t in (start, end)))
        assert variance_added(step) == pytest.approx(path.betas()[i].item(), rel=1e-9)
    times, x = time_grid(path, 4), torch.ones(1, 1, 1, 1)
    large, small = (
        ddpm(lambda x, t: torch.zeros_like(x), x, path, times[:2], generators(3), variance=variance)
        for variance in ("fixed_large", "fixed_small")
    )
    assert not torch.equal(large, small)


def test_lcm_goes_where_the_denoiser_says_and_makes_new_noise():
    path, times = ScaledLinearBetaPath(), double(1.0, 0.5, 0.0)
    x = SAMPLERS["lcm"].function(lambda x, t: torch.full_like(x, 2.0), torch.zeros(1, 1, 4, 4), path, times[:2],
                                 generators(7))  # fmt: skip
    noise = noise_like(x, generators(7))
    assert torch.allclose(x, path.alpha(times[1]).float() * 2 + path.sigma(times[1]).float() * noise)
    final = SAMPLERS["lcm"].function(lambda x, t: torch.full_like(x, 2.0), x, path, times, generators(7))
    assert torch.equal(final, torch.full_like(x, 2.0))
