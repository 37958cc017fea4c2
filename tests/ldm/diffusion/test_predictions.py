"""Predictions: every formula against an independent linear solve, and broadcasting that peers' tests hide."""

from typing import get_args

import pytest
import torch

from ldm.diffusion.paths import PathConfig, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.diffusion.predictions import Prediction, expand_times, noise_sample, target, to_x0

PATHS = [kind() for kind in get_args(PathConfig)]
PREDICTIONS = get_args(Prediction)
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)

# Three samples, and a last axis of three: three times that meet the wrong axis raise no error.
SHAPE = (3, 2, 5, 3)
TIMES = torch.tensor([0.1, 0.5, 0.95], dtype=torch.float64)


def pair(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, *SHAPE, generator=generator, dtype=dtype))  # type: ignore[return-value]


def output_row(prediction: Prediction, path: PathConfig, t: torch.Tensor) -> list[float]:
    """The shares of x0 and eps in a prediction, written out a second time."""
    table = {
        "eps": [0.0, 1.0],
        "v": [-path.sigma(t).item(), path.alpha(t).item()],
        "velocity": [path.d_alpha(t).item(), path.d_sigma(t).item()],
    }
    return table[prediction]


@every_path
def test_noise_sample_is_that_of_each_sample_alone(path):
    x0, eps = pair()
    x_t = noise_sample(x0, eps, path, TIMES)
    for i, t in enumerate(TIMES):
        assert torch.equal(x_t[i], path.alpha(t).item() * x0[i] + path.sigma(t).item() * eps[i])


@every_path
@every_prediction
def test_target_by_its_definition(path, prediction):
    x0, eps = pair()
    answer = target(prediction, x0, eps, path, TIMES)
    for i, t in enumerate(TIMES):
        x0_share, eps_share = output_row(prediction, path, t)
        assert torch.allclose(answer[i], x0_share * x0[i] + eps_share * eps[i], rtol=1e-12)


@every_path
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


@every_path
@every_prediction
def test_round_trip_in_float32(path, prediction):
    x0, eps = pair(torch.float32)
    times = TIMES.float()
    x_t = noise_sample(x0, eps, path, times)
    output = target(prediction, x0, eps, path, times)
    assert torch.allclose(to_x0(prediction, output, x_t, path, times), x0, atol=1e-4)


@every_path
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


@pytest.mark.parametrize("prediction", ["v", "velocity"])
def test_finite_and_right_at_pure_noise(prediction):
    x0, eps = pair()
    path, t = RectifiedFlowPath(), torch.tensor(1.0, dtype=torch.float64)
    answer = to_x0(prediction, target(prediction, x0, eps, path, t), eps, path, t)
    assert torch.allclose(answer, x0, rtol=1e-12)


def test_eps_says_nothing_at_pure_noise():
    _, eps = pair()
    assert not to_x0("eps", eps, eps, RectifiedFlowPath(), torch.tensor(1.0)).isfinite().any()
    assert to_x0("eps", eps, eps, ScaledLinearBetaPath(), torch.tensor(1.0)).isfinite().all()


@every_path
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_exact_at_clean_data(path, prediction):
    x0, output = pair()
    assert torch.equal(to_x0(prediction, output, x0, path, torch.tensor(0.0)), x0)


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
