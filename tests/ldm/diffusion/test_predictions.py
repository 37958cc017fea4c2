"""Predictions: every formula against an independent linear solve, and broadcasting that peers' tests hide."""

from typing import get_args

import pytest
import torch

from ldm.diffusion.paths import EDMPath, PathConfig, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.diffusion.predictions import (
    SMALLEST_ALPHA,
    Prediction,
    expand_times,
    from_x0,
    network_input,
    noise_sample,
    score,
    target,
    to_x0,
    x0_sensitivity,
)

PREDICTIONS = get_args(Prediction)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)

# Three samples, and a last axis of three: three times that meet the wrong axis raise no error.
SHAPE = (3, 2, 5, 3)
TIMES = torch.tensor([0.1, 0.5, 0.95], dtype=torch.float64)


def pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, *SHAPE, generator=generator, dtype=dtype))  # type: ignore[return-value]


def output_row(prediction: Prediction, path: PathConfig, t: torch.Tensor) -> list[float]:
    """The shares of x0 and eps in a prediction, written out a second time."""
    alpha, sigma, deviation = path.alpha(t).item(), path.sigma(t).item(), path.sigma_data
    variance = alpha**2 * deviation**2 + sigma**2
    c_skip, c_out = alpha * deviation**2 / variance, sigma * deviation / variance**0.5
    table = {
        "x0": [1.0, 0.0],
        "eps": [0.0, 1.0],
        "v": [-sigma, alpha],
        "velocity": [path.d_alpha(t).item(), path.d_sigma(t).item()],
        "edm": [(1 - c_skip * alpha) / c_out, -c_skip * sigma / c_out],
    }
    return table[prediction]


def test_noise_sample_is_that_of_each_sample_alone(path):
    x0, eps = pair()
    x_t = noise_sample(x0, eps, path, TIMES)
    for i, t in enumerate(TIMES):
        assert torch.equal(x_t[i], path.alpha(t).item() * x0[i] + path.sigma(t).item() * eps[i])


@every_prediction
def test_target_by_its_definition(path, prediction):
    x0, eps = pair()
    answer = target(prediction, x0, eps, path, TIMES)
    for i, t in enumerate(TIMES):
        x0_share, eps_share = output_row(prediction, path, t)
        assert torch.allclose(answer[i], x0_share * x0[i] + eps_share * eps[i], rtol=1e-12)


@every_prediction
def test_x0_against_a_linear_solve(path, prediction):
    """x_t and the output are two combinations of (x0, eps): solve the 2 x 2 system, for any output."""
    x_t, output = pair()
    answer = to_x0(prediction, output, x_t, path, TIMES)
    for i, t in enumerate(TIMES):
        system = torch.tensor(
            [[path.alpha(t).item(), path.sigma(t).item()], output_row(prediction, path, t)],
            dtype=torch.float64,
        )
        x0 = torch.linalg.solve(system, torch.stack([x_t[i].flatten(), output[i].flatten()]))[0]
        assert torch.allclose(answer[i].flatten(), x0, rtol=1e-9)


@every_prediction
def test_round_trip_in_float32(path, prediction):
    x0, eps = pair(torch.float32)
    times = TIMES.float()
    x_t = noise_sample(x0, eps, path, times)
    output = target(prediction, x0, eps, path, times)
    # As many digits as x_t has of x0: at EDM's larger times the noise is a hundred times as large.
    rounding = 1e-5 * (1 + path.sigma(times).max().item() / path.alpha(times).min().item())
    assert torch.allclose(to_x0(prediction, output, x_t, path, times), x0, atol=rounding)


@every_prediction
def test_scalar_time_is_the_same_time_for_all(path, prediction):
    x_t, output = pair()
    one, many = torch.tensor(0.5, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    assert torch.equal(to_x0(prediction, output, x_t, path, one), to_x0(prediction, output, x_t, path, many))
    assert torch.equal(target(prediction, output, x_t, path, one), target(prediction, output, x_t, path, many))
    assert torch.equal(noise_sample(output, x_t, path, one), noise_sample(output, x_t, path, many))


def test_velocity_on_rectified_flow_is_eps_minus_x0():
    x0, eps = pair()
    assert torch.equal(target("velocity", x0, eps, RectifiedFlowPath(), TIMES), eps - x0)


@pytest.mark.parametrize("path", [EDMPath(), EDMPath(sigma_data=1.0)])
def test_edms_table_1(path):
    """c_skip and c_out as printed there, for alpha = 1."""
    x_t, output = pair()
    sigma, deviation = path.sigma(TIMES).view(-1, 1, 1, 1), path.sigma_data
    c_skip = deviation**2 / (sigma**2 + deviation**2)
    c_out = sigma * deviation / (deviation**2 + sigma**2).sqrt()
    assert torch.allclose(to_x0("edm", output, x_t, path, TIMES), c_skip * x_t + c_out * output, rtol=1e-12)


def test_f_is_v_turned_round_where_variance_is_preserved(table_path):
    x0, eps = pair()
    assert torch.allclose(target("edm", x0, eps, table_path, TIMES), -target("v", x0, eps, table_path, TIMES))


def test_what_is_to_be_answered_has_unit_variance_under_edm(path):
    """Over data of variance sigma_data^2 and noise of variance 1, at every time: EDM's first requirement."""
    x0_share, eps_share = (torch.tensor(row) for row in zip(*(output_row("edm", path, t) for t in TIMES), strict=True))
    assert torch.allclose(x0_share**2 * path.sigma_data**2 + eps_share**2, torch.ones(3), rtol=1e-5)


@every_prediction
def test_outputs_and_x0_are_two_ways_to_say_it(path, prediction):
    x_t, output = pair()
    x0 = to_x0(prediction, output, x_t, path, TIMES)
    assert torch.allclose(from_x0(prediction, x0, x_t, path, TIMES), output, rtol=1e-8, atol=1e-10)


@every_prediction
@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_both_ends(path, prediction, end, dtype):
    x0, eps = pair(dtype)
    t = torch.tensor(end, dtype=dtype)
    x_t = noise_sample(x0, eps, path, t)
    assert to_x0(prediction, eps, x_t, path, t).isfinite().all()
    endless = prediction == "velocity" and end == 0 and hasattr(path, "num_train_timesteps")
    assert target(prediction, x0, eps, path, t).isfinite().all() != endless
    assert from_x0(prediction, x0, x_t, path, t).isfinite().all() != endless
    if end == 0:
        assert torch.allclose(to_x0(prediction, eps, x_t, path, t), eps if prediction == "x0" else x0)


@pytest.mark.parametrize("prediction", ["x0", "v", "velocity", "edm"])
def test_right_at_pure_noise(path, prediction):
    x0, eps = pair()
    t = torch.tensor(1.0, dtype=torch.float64)
    x_t = noise_sample(x0, eps, path, t)
    answer = to_x0(prediction, target(prediction, x0, eps, path, t), x_t, path, t)
    assert torch.allclose(answer, x0, rtol=1e-6, atol=1e-9)


def test_eps_says_nothing_at_pure_noise():
    """x_t = eps whatever the data were; the answer is finite, and as right as it can be: 0."""
    _, eps = pair()
    assert to_x0("eps", eps, eps, RectifiedFlowPath(), torch.tensor(1.0)).abs().max() == 0
    off = to_x0("eps", 0.99 * eps, eps, RectifiedFlowPath(), torch.tensor(1.0))
    assert torch.allclose(off, 0.01 * eps / SMALLEST_ALPHA, rtol=1e-9) and SMALLEST_ALPHA == 1 / 4096


def test_the_score_is_the_gradient_of_the_log_density(path):
    x0, eps = pair()
    t = torch.tensor(0.4, dtype=torch.float64)
    x_t = noise_sample(x0, eps, path, t).requires_grad_()
    density = torch.distributions.Normal(path.alpha(t) * x0, path.sigma(t))
    (gradient,) = torch.autograd.grad(density.log_prob(x_t).sum(), x_t)
    found = score(x0, x_t.detach(), path.alpha(t), path.sigma(t))
    assert torch.allclose(found, gradient, rtol=1e-9)
    assert torch.allclose(found, -eps / path.sigma(t), rtol=1e-9)


@every_prediction
def test_sensitivity_is_that_of_autograd(path, prediction):
    for t in TIMES:
        output = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        x0 = to_x0(prediction, output, torch.tensor(0.7, dtype=torch.float64), path, t)
        (gradient,) = torch.autograd.grad(x0, output)
        assert x0_sensitivity(prediction, path, t).item() == pytest.approx(gradient.item() ** 2, rel=1e-12)


def test_bfloat16_outputs_are_converted_in_the_latents_float32():
    x_t, output = pair(torch.float32)
    rounded = output.bfloat16()
    answer = to_x0("v", rounded, x_t, ScaledLinearBetaPath(), TIMES.float())
    assert answer.dtype == torch.float32
    assert torch.equal(answer, to_x0("v", rounded.float(), x_t, ScaledLinearBetaPath(), TIMES.float()))


def test_expand_times():
    x = torch.zeros(SHAPE)
    assert expand_times(TIMES, x).shape == (3, 1, 1, 1) and expand_times(TIMES, x).dtype == torch.float32
    assert (x + expand_times(TIMES, x))[1].eq(0.5).all()
    for wrong in (torch.zeros(1), torch.zeros(5), torch.zeros(3, 1)):
        with pytest.raises(ValueError, match="give one time, or 3"):
            expand_times(wrong, x)


@every_prediction
def test_inputs_are_left_alone(prediction):
    x_t, output = pair()
    copies = x_t.clone(), output.clone()
    to_x0(prediction, output, x_t, RectifiedFlowPath(), TIMES)
    target(prediction, output, x_t, RectifiedFlowPath(), TIMES)
    assert torch.equal(x_t, copies[0]) and torch.equal(output, copies[1])


@pytest.mark.parametrize("t", [TIMES, TIMES[1]], ids=["a time each", "one time"])
def test_a_networks_input_has_unit_variance_and_a_timestep_per_sample(t: torch.Tensor):
    path, x_t = EDMPath(), pair(torch.float32)[0]
    scaled, timesteps = network_input(x_t, path, t)
    sigma = path.sigma(t).expand(len(x_t))
    expected = x_t / (sigma**2 + path.sigma_data**2).sqrt().float()[:, None, None, None]
    torch.testing.assert_close(scaled, expected)
    torch.testing.assert_close(timesteps, (sigma.log() / 4).float())
