"""Noise paths: tables against independent ones, derivatives against autograd, boundaries, rounding."""

import math
from typing import get_args

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from ldm.diffusion.paths import LinearBetaPath, PathConfig, RectifiedFlowPath, ScaledLinearBetaPath

PATHS = [kind() for kind in get_args(PathConfig)]
TABLE_PATHS = [path for path in PATHS if not isinstance(path, RectifiedFlowPath)]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
every_table_path = pytest.mark.parametrize("path", TABLE_PATHS, ids=lambda path: path.kind)


def nodes(path: LinearBetaPath | ScaledLinearBetaPath, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    n = path.num_train_timesteps
    return torch.arange(1, n + 1, dtype=dtype) / n


def test_every_kind_has_its_own_name():
    assert len({path.kind for path in PATHS}) == len(PATHS)


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


@pytest.mark.parametrize(
    ("path", "schedule"), [(LinearBetaPath(), "linear"), (ScaledLinearBetaPath(), "scaled_linear")]
)
def test_table_against_diffusers(path, schedule):
    scheduler = DDIMScheduler(
        beta_start=path.beta_start, beta_end=path.beta_end, beta_schedule=schedule, num_train_timesteps=1000
    )
    # diffusers multiplies a thousand float32 factors: its table is good to about 1e-5.
    ours = path.alpha(nodes(path, torch.float32)) ** 2
    assert torch.allclose(ours, scheduler.alphas_cumprod, rtol=3e-5, atol=0)


def test_known_ends():
    end = torch.tensor(1.0)
    assert ScaledLinearBetaPath().alpha(end).item() ** 2 == pytest.approx(0.0046600, abs=1e-6)
    assert LinearBetaPath().alpha(end).item() ** 2 == pytest.approx(4.0358e-05, rel=1e-4)
    assert LinearBetaPath().sigma(torch.tensor(0.001)).item() ** 2 == pytest.approx(1e-4, rel=1e-6)
    assert RectifiedFlowPath().alpha(end) == 0 and RectifiedFlowPath().sigma(end) == 1


@every_path
def test_begins_at_clean_data(path):
    assert path.alpha(torch.tensor(0.0)) == 1 and path.sigma(torch.tensor(0.0)) == 0


@every_table_path
def test_variance_preserving(path):
    t = torch.linspace(0, 1, 3001, dtype=torch.float64)
    assert torch.allclose(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t), rtol=0, atol=1e-14)


@every_path
def test_signal_to_noise_falls_strictly(path):
    t = torch.linspace(0, 1, 3001, dtype=torch.float64)
    assert (path.alpha(t).diff() < 0).all() and (path.sigma(t).diff() > 0).all()


@every_path
def test_derivatives_are_those_of_autograd(path):
    times = [0.0001, 0.00123, 0.2, 0.3, 0.50049, 0.77777, 0.9996, 1.0]
    t = torch.tensor(times, dtype=torch.float64, requires_grad=True)
    for value, derivative in [(path.alpha, path.d_alpha), (path.sigma, path.d_sigma)]:
        (gradient,) = torch.autograd.grad(value(t).sum(), t)
        assert torch.allclose(derivative(t), gradient, rtol=1e-9, atol=0)


@every_table_path
def test_derivatives_at_a_node_are_those_below_it(path):
    """The slope jumps at nodes, and training times are nodes: one side must be chosen."""
    node, below, above = torch.tensor([0.5, 0.4995, 0.5005], dtype=torch.float64)

    def slope(t: torch.Tensor) -> float:
        return (path.d_alpha(t) / path.alpha(t)).item()

    assert slope(node) == pytest.approx(slope(below), rel=1e-9)
    assert slope(node) != pytest.approx(slope(above), rel=1e-4)


@every_path
def test_derivatives_are_those_of_finite_differences(path):
    t, h = torch.tensor([0.0115, 0.5005, 0.9875], dtype=torch.float64), 1e-5
    for value, derivative in [(path.alpha, path.d_alpha), (path.sigma, path.d_sigma)]:
        assert torch.allclose(derivative(t), (value(t + h) - value(t - h)) / (2 * h), rtol=1e-5, atol=0)


@every_table_path
def test_interpolation_is_linear_in_log_alpha_bar(path):
    left, right = torch.tensor(0.417, dtype=torch.float64), torch.tensor(0.418, dtype=torch.float64)
    quarter = path.alpha(left + 0.25 * (right - left)).log()
    expected = 0.75 * path.alpha(left).log() + 0.25 * path.alpha(right).log()
    assert torch.allclose(quarter, expected, rtol=1e-12)


@every_table_path
def test_sigma_keeps_its_digits_near_the_data(path):
    # 1 - alpha_bar would be exactly 0 here; sigma^2 ~ -N log(1 - beta_0) t.
    t = torch.tensor(1e-20, dtype=torch.float64)
    slope = -1000 * math.log1p(-path.betas()[0].item())
    assert path.sigma(t).item() ** 2 == pytest.approx(1e-20 * slope, rel=1e-12, abs=0)


@every_table_path
def test_float32_nodes_are_exact(path):
    at_nodes, exact = nodes(path, torch.float32), nodes(path)
    assert torch.equal(path.timesteps(at_nodes), torch.arange(1000.0))
    for value in (path.alpha, path.sigma, path.d_alpha, path.d_sigma):
        assert torch.equal(value(at_nodes), value(exact).float())


@every_table_path
def test_timesteps_between_nodes(path):
    t = torch.tensor([0.0, 0.25025, 1.0], dtype=torch.float64)
    assert torch.allclose(path.timesteps(t), torch.tensor([-1.0, 249.25, 999.0], dtype=torch.float64))


def test_flow_timesteps():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert torch.equal(RectifiedFlowPath().timesteps(t), torch.tensor([0.0, 250.0, 1000.0]))


@every_path
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 1, 4)])
def test_shape_and_dtype_follow_the_times(path, shape, dtype):
    t = torch.full(shape, 0.3, dtype=dtype)
    for name in ("alpha", "sigma", "d_alpha", "d_sigma", "timesteps", "training_times", "snap"):
        answer = getattr(path, name)(t)
        assert (answer.shape, answer.dtype) == (t.shape, dtype), name
        assert answer.data_ptr() != t.data_ptr(), name


@every_table_path
def test_training_times_visit_every_node_equally_often(path):
    u = (torch.arange(5000) + 0.5) / 5000
    times = path.training_times(u)
    assert torch.equal(path.timesteps(times), torch.arange(1000.0).repeat_interleave(5))
    assert torch.equal(path.training_times(torch.tensor([0.0, 1.0])), torch.tensor([0.001, 1.0]))


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


@every_table_path
@pytest.mark.parametrize("wrong", [{"beta_start": 0.5, "beta_end": 0.1}, {"beta_start": 0.0}, {"beta_end": 1.0}])
def test_impossible_betas_are_refused(path, wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        type(path)(**wrong)


@every_table_path
def test_too_short_a_table_is_refused(path):
    with pytest.raises(ValueError, match="num_train_timesteps is 1"):
        type(path)(num_train_timesteps=1)
