"""Noise paths: tables against independent ones, derivatives against autograd, boundaries, rounding."""

import math
from typing import Any, get_args

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from helpers.analytic import double

from ldm.diffusion.paths import EDMPath, PathConfig, RectifiedFlowPath, prior_std
from ldm.diffusion.table_paths import BetaTablePath, CosinePath, LinearBetaPath, ScaledLinearBetaPath


def nodes(path: BetaTablePath, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    n = path.num_train_timesteps
    return torch.arange(1, n + 1, dtype=dtype) / n


def test_every_kind_has_its_own_name():
    kinds = get_args(PathConfig)
    assert len({kind().kind for kind in kinds}) == len(kinds)


def test_stable_diffusion_table_by_its_own_recipe():
    # A plain running product in float64, as the original code makes its buffer; ours is a sum of logarithms.
    product, alphas_cumprod = 1.0, []
    for i in range(1000):
        root = 0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * i / 999
        product *= 1 - root**2
        alphas_cumprod.append(product)
    path = ScaledLinearBetaPath()
    expected = torch.tensor(alphas_cumprod, dtype=torch.float64)
    assert torch.allclose(path.alpha(nodes(path)) ** 2, expected, rtol=1e-12, atol=0)
    assert torch.allclose(path.sigma(nodes(path)) ** 2, 1 - expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    ("kind", "schedule"),
    [(LinearBetaPath, "linear"), (ScaledLinearBetaPath, "scaled_linear"), (CosinePath, "squaredcos_cap_v2")],
)
def test_table_against_diffusers(kind, schedule, zero):
    path = kind(zero_terminal_snr=zero)
    betas = {} if kind is CosinePath else {"beta_start": path.beta_start, "beta_end": path.beta_end}
    scheduler = DDIMScheduler(**betas, beta_schedule=schedule, rescale_betas_zero_snr=zero)
    # diffusers multiplies a thousand float32 factors: its table is good to about 1e-5.
    ours = path.alpha(nodes(path, torch.float32)) ** 2
    assert torch.allclose(ours, scheduler.alphas_cumprod, rtol=4e-5, atol=1e-9)


def test_the_cosine_is_a_cosine_until_its_limit():
    path = CosinePath()
    t = nodes(path)[:-1]
    expected = ((t + 0.008) / 1.008 * math.pi / 2).cos() / math.cos(0.008 / 1.008 * math.pi / 2)
    assert torch.allclose(path.alpha(t), expected, rtol=1e-9)
    assert path.betas()[-1] == 0.999 and path.betas().max() == 0.999


@pytest.mark.parametrize("kind", [LinearBetaPath, ScaledLinearBetaPath, CosinePath])
def test_a_terminal_level_without_data(kind):
    plain, path = kind(), kind(zero_terminal_snr=True)
    t = nodes(path)
    alpha = path.alpha(t)
    assert alpha[-1] == 0 and path.sigma(t)[-1] == 1
    assert alpha[0].item() == pytest.approx(plain.alpha(t)[0].item(), rel=1e-12)
    # In between, alpha is a linear function of what it was.
    share = (alpha - alpha[-1]) / (plain.alpha(t) - plain.alpha(t)[-1])
    assert torch.allclose(share[:-1], share[0].expand(999), rtol=1e-9)
    # On the way to the last level alpha falls evenly.
    assert path.alpha(double(0.99925)).item() == pytest.approx(0.75 * alpha[-2].item(), rel=1e-9)


def test_the_shift_of_a_flow_against_diffusers():
    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=3.0)
    path = RectifiedFlowPath(shift=3.0)
    t = nodes(LinearBetaPath()).flip(0)
    assert torch.allclose(path.sigma(t).float(), scheduler.sigmas, rtol=1e-6)
    assert torch.allclose(path.timesteps(t).float(), scheduler.timesteps, rtol=1e-6)


def test_a_shift_moves_log_snr_by_a_constant():
    """At every time the noise weighs `shift` times as much: what m / n times as many pixels need."""
    t = double(0.1, 0.5, 0.93)
    difference = RectifiedFlowPath().log_snr(t) - RectifiedFlowPath(shift=3.0).log_snr(t)
    assert difference.tolist() == pytest.approx([2 * math.log(3.0)] * 3)


def test_edm_against_the_table_of_its_paper():
    path, sigma = EDMPath(), double(0.002, 0.5, 80.0)
    t = path.time_of_log_snr(-2 * sigma.log())
    assert path.sigma(t).tolist() == pytest.approx(sigma.tolist())
    assert path.input_scale(t).tolist() == pytest.approx([(s**2 + 0.25) ** -0.5 for s in sigma.tolist()])
    assert path.timesteps(t).tolist() == pytest.approx([math.log(s) / 4 for s in sigma.tolist()])
    # Even steps of t are even steps of sigma^(1/7).
    roots = path.sigma(double(0.25, 0.5, 0.75, 1.0)) ** (1 / 7)
    assert torch.allclose(roots.diff(), roots.diff()[0].expand(3))


def test_the_input_has_unit_variance(path):
    t = double(0.0, 0.2, 0.9, 1.0)
    variance = path.alpha(t) ** 2 * path.sigma_data**2 + path.sigma(t) ** 2
    if isinstance(path, RectifiedFlowPath):  # nobody scales its input, so neither do we
        assert path.input_scale(t).tolist() == [1.0] * 4
    else:
        assert (path.input_scale(t) ** 2 * variance).tolist() == pytest.approx([1.0] * 4)


def test_known_ends():
    end = torch.tensor(1.0)
    assert ScaledLinearBetaPath().alpha(end).item() ** 2 == pytest.approx(0.0046600, abs=1e-6)
    assert LinearBetaPath().alpha(end).item() ** 2 == pytest.approx(4.0358e-05, rel=1e-4)
    assert LinearBetaPath().sigma(torch.tensor(0.001)).item() ** 2 == pytest.approx(1e-4, rel=1e-6)
    assert RectifiedFlowPath().alpha(end) == 0 and RectifiedFlowPath().sigma(end) == 1


def test_begins_at_clean_data(path):
    assert path.alpha(torch.tensor(0.0)) == 1 and path.sigma(torch.tensor(0.0)) == 0


def test_variance_preserving(table_path):
    t = torch.linspace(0, 1, 3001, dtype=torch.float64)
    assert torch.allclose(table_path.alpha(t) ** 2 + table_path.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)


def test_signal_to_noise_falls_strictly(path):
    t = torch.linspace(0, 1, 3001, dtype=torch.float64)
    assert (path.sigma(t).diff() > 0).all()
    assert (path.alpha(t).diff() < 0).all() or isinstance(path, EDMPath)
    assert (path.log_snr(t).diff()[1:-1] < 0).all()


def test_log_snr_is_that_of_alpha_and_sigma(path):
    t = double(0.004, 0.3, 0.5004, 0.77, 0.9991)
    expected = 2 * (path.alpha(t) / path.sigma(t)).log()
    assert torch.allclose(path.log_snr(t), expected, rtol=1e-9, atol=1e-9)
    assert path.log_snr(double(0.0)).isposinf()
    assert path.log_snr(double(1.0)).isneginf() == (path.alpha(double(1.0)) == 0)


def test_log_snr_and_time_are_inverse(path):
    t = double(1e-3, 0.0015, 0.123, 0.5, 0.5004, 0.9, 0.999, 0.9995, 1.0)
    assert torch.allclose(path.time_of_log_snr(path.log_snr(t)), t, rtol=1e-9)
    single = path.time_of_log_snr(torch.tensor([[1.5], [-2.0]]))
    assert single.shape == (2, 1) and single.dtype == torch.float32
    assert torch.allclose(path.log_snr(single), torch.tensor([[1.5], [-2.0]]), atol=1e-4)


def test_beyond_the_ends_of_the_path_are_its_ends(path):
    assert path.time_of_log_snr(double(math.inf, 1e4)).tolist() == pytest.approx([0.0, 0.0], abs=1e-30)
    assert path.time_of_log_snr(double(-math.inf, -1e4)).tolist() == pytest.approx([1.0, 1.0])


def test_the_range_of_log_snr_is_finite_and_inside(path):
    noisy, clean = path.log_snr_range
    assert -math.inf < noisy < clean < math.inf
    times = path.time_of_log_snr(double(noisy, clean))
    assert 0.9 < times[0] <= 1 and 0 < times[1] < 0.25


def test_derivatives_are_those_of_autograd(path):
    times = [0.0001, 0.00123, 0.2, 0.3, 0.50049, 0.77777, 0.9989, 0.9996, 1.0]
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    for value, derivative in [(path.alpha, path.d_alpha), (path.sigma, path.d_sigma)]:
        (gradient,) = torch.autograd.grad((value(t) + 0 * t).sum(), t)
        assert torch.allclose(derivative(t), gradient, rtol=1e-9, atol=1e-11)


def test_derivatives_at_a_node_are_those_below_it(table_path):
    """The slope jumps at nodes, and training times are nodes: one side must be chosen."""
    node, below, above = torch.tensor([0.5, 0.4995, 0.5005], dtype=torch.float64)

    def slope(t: torch.Tensor) -> float:
        return (table_path.d_alpha(t) / table_path.alpha(t)).item()

    assert slope(node) == pytest.approx(slope(below), rel=1e-9)
    assert slope(node) != pytest.approx(slope(above), rel=1e-4)


def test_derivatives_are_those_of_finite_differences(path):
    t, h = torch.tensor([0.0115, 0.5005, 0.9875], dtype=torch.float64), 1e-5
    for value, derivative in [(path.alpha, path.d_alpha), (path.sigma, path.d_sigma)]:
        assert torch.allclose(derivative(t), (value(t + h) - value(t - h)) / (2 * h), rtol=1e-5, atol=0)


def test_interpolation_is_linear_in_log_alpha_bar(table_path):
    left, right = torch.tensor(0.417, dtype=torch.float64), torch.tensor(0.418, dtype=torch.float64)
    quarter = table_path.alpha(left + 0.25 * (right - left)).log()
    expected = 0.75 * table_path.alpha(left).log() + 0.25 * table_path.alpha(right).log()
    assert torch.allclose(quarter, expected, rtol=1e-12)


def test_sigma_keeps_its_digits_near_the_data(table_path):
    # 1 - alpha_bar would be exactly 0 here; sigma^2 ~ -N log(1 - beta_0) t.
    t = torch.tensor(1e-20, dtype=torch.float64)
    slope = -1000 * math.log1p(-table_path.betas()[0].item())
    assert table_path.sigma(t).item() ** 2 == pytest.approx(1e-20 * slope, rel=1e-11, abs=0)


def test_float32_nodes_are_exact(table_path):
    at_nodes, exact = nodes(table_path, torch.float32), nodes(table_path)
    assert torch.equal(table_path.timesteps(at_nodes), torch.arange(1000.0))
    for value in (table_path.alpha, table_path.sigma, table_path.d_alpha, table_path.d_sigma):
        assert torch.equal(value(at_nodes), value(exact).float())


def test_timesteps_between_nodes(table_path):
    t = torch.tensor([0.0, 0.25025, 1.0], dtype=torch.float64)
    assert torch.allclose(table_path.timesteps(t), torch.tensor([-1.0, 249.25, 999.0], dtype=torch.float64))


def test_flow_timesteps():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(RectifiedFlowPath().timesteps(t), torch.tensor([0.0, 250.0, 1000.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)])
def test_shape_and_dtype_follow_the_times(path, shape, dtype):
    t = torch.full(shape, 0.3, dtype=dtype)
    for name in ("alpha", "sigma", "d_alpha", "d_sigma", "timesteps", "training_times", "snap"):
        answer = getattr(path, name)(t)
        assert (answer.shape, answer.dtype) == (t.shape, dtype), name
        assert answer.data_ptr() != t.data_ptr(), name


def test_training_times_visit_every_node_equally_often(table_path):
    u = (torch.arange(5000) + 0.5) / 5000
    times = table_path.training_times(u)
    assert torch.equal(table_path.timesteps(times), torch.arange(1000.0).repeat_interleave(5))
    assert torch.equal(table_path.training_times(torch.tensor([0.0, 1.0])), torch.tensor([0.001, 1.0]))


def test_flow_training_times_are_continuous_and_inside():
    path, u = RectifiedFlowPath(), torch.tensor([0.0, 0.12345, 1.0])
    times = path.training_times(u)
    assert times[1] == u[1] and 0 < times[0] < 1e-6 and 1 - 1e-6 < times[2] < 1


def test_snap():
    t = torch.tensor([0.0, 0.0004, 0.96667, 1.0])
    assert torch.equal(ScaledLinearBetaPath().snap(t), torch.tensor([0.0, 0.0, 0.967, 1.0]))
    assert torch.equal(RectifiedFlowPath().snap(t), t)


def test_own_parameters_are_used():
    path = LinearBetaPath(beta_start=0.1, beta_end=0.3, num_train_timesteps=3)
    alpha_bar = path.alpha(torch.tensor([1 / 3, 2 / 3, 1], dtype=torch.float64)) ** 2
    assert alpha_bar.tolist() == pytest.approx([0.9, 0.9 * 0.8, 0.9 * 0.8 * 0.7])
    scaled = ScaledLinearBetaPath(beta_start=0.04, beta_end=0.16, num_train_timesteps=3)
    assert scaled.betas().tolist() == pytest.approx([0.04, 0.09, 0.16])


@pytest.mark.parametrize("kind", [LinearBetaPath, ScaledLinearBetaPath])
@pytest.mark.parametrize("wrong", [{"beta_start": 0.5, "beta_end": 0.1}, {"beta_start": 0.0}, {"beta_end": 1.0}])
def test_impossible_betas_are_refused(kind, wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        kind(**wrong)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (RectifiedFlowPath, {"shift": 0.0}),
        (CosinePath, {"offset": 0.0}),
        (CosinePath, {"beta_limit": 1.0}),
        (EDMPath, {"sigma_min": 81.0}),
        (EDMPath, {"sigma_data": -0.5}),
        (EDMPath, {"rho": 0.5}),
    ],
)
def test_impossible_numbers_are_refused(kind, wrong):
    ((key, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{key}\D* {value}\D"):
        kind(**wrong)


def test_too_short_a_table_is_refused(table_path):
    with pytest.raises(ValueError, match="num_train_timesteps is 1"):
        type(table_path)(num_train_timesteps=1)


def test_the_range_of_log_snr_is_that_of_the_ends_that_are_trained(path):
    """The first and the last node of a table where it is finite; a thousandth from both ends of a flow."""
    n = getattr(path, "num_train_timesteps", 1000)
    if path.kind == "rectified_flow":
        ends = [2 * math.log(s / (1 - s)) for s in (0.001, 0.999)]
    elif path.kind == "edm":
        ends = [-2 * math.log(80.0), -2 * math.log(0.002)]
    else:
        ends = [path.log_snr(double(k / n)).item() for k in (n - path.zero_terminal_snr, 1)]
    assert path.log_snr_range == pytest.approx(tuple(ends), rel=1e-9)


def test_defaults_are_the_published_ones():
    assert RectifiedFlowPath() == RectifiedFlowPath(shift=1.0)
    assert [kind().sigma_data for kind in get_args(PathConfig)] == [1.0, 1.0, 1.0, 1.0, 0.5]
    assert EDMPath() == EDMPath(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    assert LinearBetaPath() == LinearBetaPath(beta_start=1e-4, beta_end=0.02, num_train_timesteps=1000)
    assert ScaledLinearBetaPath() == ScaledLinearBetaPath(beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)


def test_training_stays_off_the_ends():
    t = EDMPath().training_times(double(0.0, 0.5, 1.0))
    assert EDMPath().sigma(t)[0].item() == pytest.approx(0.002, rel=1e-9) and t[1:].tolist() == [0.5, 1.0]
    eps = torch.finfo(torch.float64).eps
    assert RectifiedFlowPath().training_times(double(0.0, 0.5, 1.0)).tolist() == [eps, 0.5, 1 - eps]


def test_what_drawing_starts_from_has_the_deviation_of_the_last_time():
    assert prior_std(EDMPath()) == pytest.approx((80**2 + 0.5**2) ** 0.5, rel=1e-12)
    assert prior_std(RectifiedFlowPath()) == 1.0
    assert prior_std(ScaledLinearBetaPath()) == pytest.approx(1.0, rel=1e-12)
