"""Samplers held to their declared order on Gaussian data, where denoiser and ODE solution are closed-form.

The grid matters: its steps in log(alpha / sigma) alternate 1 : 3, for on a smooth grid a multistep solver
that ignores the ratio of its steps still shows its full order.
"""

import math
from collections.abc import Sequence

import pytest
import torch
from helpers.analytic import MEAN, STD, double, generators, ideal_denoiser, ideal_scatter, marginal, uneven
from torch import Tensor

from ldm.diffusion.paths import EDMPath, PathConfig, RectifiedFlowPath, ScaledLinearBetaPath, prior_std
from ldm.samplers import SAMPLERS, TIME_GRIDS, noise_like, time_grid

DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]
# lcm is for consistency models: it draws means from any other denoiser.
DRAWS_DATA = [name for name, sampler in SAMPLERS.items() if sampler.stochastic and name != "lcm"]
FEW_NOISES = {"restart": 2, "dpm_fast": 20, "dpm_adaptive": 2}  # others draw one for each step
STEPS = (256, 512)
EXACT = 1e-11  # what rounding alone makes of no error at all


def uneven_in_log_snr(path: PathConfig, steps: int, *, start: float = -2.5, stop: float = 2.5) -> Tensor:
    """Times between two values of lambda = log(alpha / sigma), uneven in it.

    The first step is cut finely at its beginning: methods that remember have nothing to remember there and take a
    DDIM step, whose error is of the second order and would hide theirs.
    """
    wanted = uneven(start, stop, steps)
    first = wanted[0] + (wanted[1] - wanted[0]) * double(*[4.0**-k for k in range(8, 0, -1)])
    return path.time_of_log_snr(2 * torch.cat([wanted[:1], first, wanted[1:]]))


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


def order(errors: Sequence[float]) -> float:
    """From the errors of two grids, the second with twice the steps of the first."""
    return math.inf if max(errors) < EXACT else math.log2(errors[0] / errors[1])


def holds_its_order(name: str, errors: Sequence[float]) -> bool:
    """Some do better on Gaussian data, where terms of their error cancel; a wrong coefficient only makes it worse."""
    return order(errors) >= SAMPLERS[name].order - 0.2


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_on_an_uneven_grid(name, path):
    assert holds_its_order(name, ode_errors(name, path, [uneven_in_log_snr(path, n) for n in STEPS]))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_from_pure_noise_to_data(name):
    """From alpha = 0 to sigma = 0, where log(alpha / sigma) is infinite at both ends.

    Steps shrink towards the ends. On a grid even in t the steps in the logarithm stay coarse there, however
    many there are, and DPM++ 2M shows 1.6 to 1.8: order 2 but for a logarithmic factor.
    """
    angles = [uneven(0.0, math.pi, steps) for steps in STEPS]
    grids = [torch.cat([(1 + angle[:-1].cos()) / 2, double(0.0)]) for angle in angles]
    # The DDIM steps at both ends take LMS a part of its fourth order.
    assert order(ode_errors(name, RectifiedFlowPath(), grids)) >= min(SAMPLERS[name].order - 0.15, 3.4)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_from_the_last_noise_level(name):
    path = ScaledLinearBetaPath()
    start = path.log_snr(double(1.0)).item() / 2
    errors = ode_errors(name, path, [uneven_in_log_snr(path, n, start=start) for n in STEPS])
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
    most = 2 * len(times)  # of noises
    x = torch.full((1, 1, 1, most + 2), start_mean.item(), dtype=torch.float64)
    x[..., 0] = unit
    denoise, variance = ideal_scatter(path, times, ideal_denoiser(path))
    with monkeypatch.context() as patch:
        patch.setattr("ldm.samplers.steps.noise_like", basis_noise)
        x = SAMPLERS[name].with_options(variance=variance)(denoise, x, path, times, []).flatten()
    assert drawn >= FEW_NOISES.get(name, len(times) - 2)
    return x[-1].item(), (x[:-1] - x[-1]).square().sum().item()


@pytest.mark.parametrize("name", DRAWS_DATA)
def test_weak_order_of_stochastic_samplers(name, path, monkeypatch):
    errors = []
    for n in (66, 132):  # multiples of three: the last step of dpm_fast depends on the rest
        times = path.time_of_log_snr(2 * uneven(-1.0, 1.0, n))
        mean, variance = moments(name, path, times, monkeypatch)
        exact_mean, upper = marginal(path, times[-1], double(0.0, 1.0)).tolist()
        assert mean == pytest.approx(exact_mean, abs=1e-12)  # x0_hat is a martingale: its mean stays
        errors.append(abs(variance - (upper - exact_mean) ** 2))
    assert holds_its_order(name, errors)


def test_a_variance_that_was_learned_well_needs_no_small_steps(path, monkeypatch):
    """On Gaussian data each step of the true reverse chain is normal, so any number of steps draws the data exactly."""
    for times in (time_grid(path, 3, "log_snr")[:-1], time_grid(path, 9, "log_snr")[:-1]):
        mean, variance = moments("ddpm_learned", path, times, monkeypatch)
        exact_mean, upper = marginal(path, times[-1], double(0.0, 1.0)).tolist()
        assert mean == pytest.approx(exact_mean, rel=1e-9)
        assert variance == pytest.approx((upper - exact_mean) ** 2, rel=1e-9)


@pytest.mark.parametrize("name", [name for name in DRAWS_DATA if name != "dpm_adaptive"])  # its tolerance is large
@pytest.mark.parametrize("path", [ScaledLinearBetaPath(), RectifiedFlowPath(), EDMPath()], ids=lambda path: path.kind)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_stochastic_samplers_draw_the_data(name, path, seed):
    """Mean and variance within four standard errors and the sampler's own error, which is below 2% of the variance."""
    noise = noise_like(torch.empty(2, 1, 60, 100), generators(seed, seed + 100))
    times = time_grid(path, 400 if SAMPLERS[name].order == 1 else 100, "log_snr")
    x = marginal(path, times[0], noise)
    denoise, variance = ideal_scatter(path, times, ideal_denoiser(path))
    x = SAMPLERS[name].with_options(variance=variance)(denoise, x, path, times, generators(seed + 200, seed + 300))
    n = x.numel()
    assert abs(x.mean() - MEAN) < 4 * STD / n**0.5 + 0.005
    assert abs(x.var() / STD**2 - 1) < 4 * (2 / n) ** 0.5 + 0.02


@pytest.mark.parametrize("grid", [*TIME_GRIDS, tuple(0.7 - 0.014 * i for i in range(50)) + (0.0,)], ids=str)
def test_what_is_started_with_fits_the_grid(grid, path):
    """The data's deviation comes out, also where the first time is below 1, as of align_your_steps and given times."""
    if grid in ("leading", "ddim_uniform") and not hasattr(path, "num_train_timesteps"):
        return
    std = 0.9 * path.sigma_data
    times = time_grid(path, 50, grid)
    x = prior_std(path, times[0].item()) * double(-1.0, 1.0)
    x = SAMPLERS["dpmpp_2m"].function(ideal_denoiser(path, 0.0, std), x, path, times, [])
    assert (x[1] - x[0]).item() / 2 == pytest.approx(std, rel=0.12)


def test_the_three_step_sampler_integrates_a_parabola(monkeypatch):
    """With x0 a parabola in lambda, whatever x is, its mean after three uneven steps is the exact integral."""
    path, nodes = RectifiedFlowPath(), double(-1.0, -0.8, -0.2, 0.5)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        half = path.log_snr(t).item() / 2
        return torch.full_like(x, 0.3 + 0.7 * half + 0.9 * half**2)

    times, x = path.time_of_log_snr(2 * nodes), torch.zeros(1, 1, 1, 4, dtype=torch.float64)
    monkeypatch.setattr("ldm.samplers.steps.noise_like", lambda x, _: torch.zeros_like(x))
    before, after = (SAMPLERS["dpmpp_3m_sde_exact"].function(denoise, x, path, times[:n], []) for n in (3, 4))
    h = (nodes[3] - nodes[2]).item()
    u = torch.linspace(0, h, 200_001, dtype=torch.float64)
    half = nodes[2] + u
    integral = torch.trapezoid(2 * (-2 * (h - u)).exp() * (0.3 + 0.7 * half + 0.9 * half**2), u).item()
    alpha, sigma, sigma_before = path.alpha(times[3]).item(), path.sigma(times[3]).item(), path.sigma(times[2]).item()
    assert torch.allclose(after, sigma / sigma_before * math.exp(-h) * before + alpha * integral, rtol=1e-8)
