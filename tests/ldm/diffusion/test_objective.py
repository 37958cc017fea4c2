"""The training objective: distribution of the times, and the loss."""

import math
from typing import Any, get_args

import pytest
import torch

from ldm.diffusion.objective import (
    ObjectiveConfig,
    Weighting,
    by_quantile,
    cosmap_density,
    diffusion_loss,
    draw_times,
    input_perturbation,
    logit_normal_density,
    loss_weight,
    offset_noise,
)
from ldm.diffusion.paths import CosinePath, EDMPath, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.diffusion.predictions import Prediction, to_x0

UNIFORMS = (torch.arange(10000) + 0.5) / 10000


def test_uniform_times_on_rectified_flow_are_the_uniforms():
    config = ObjectiveConfig(prediction="velocity")
    assert torch.equal(draw_times(config, RectifiedFlowPath(), UNIFORMS), UNIFORMS)


def test_uniform_times_on_a_table_are_its_nodes():
    path = ScaledLinearBetaPath()
    times = draw_times(ObjectiveConfig(prediction="eps"), path, UNIFORMS)
    assert times.dtype == torch.float32
    assert torch.equal(path.timesteps(times), torch.arange(1000.0).repeat_interleave(10))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.6, 0.8)])
def test_logit_normal_times(mean, std):
    config = ObjectiveConfig(prediction="velocity", time_sampling="logit_normal", logit_mean=mean, logit_std=std)
    times = draw_times(config, RectifiedFlowPath(), UNIFORMS).double()
    logits = torch.logit(times)
    assert logits.mean().item() == pytest.approx(mean, abs=1e-3)
    assert logits.std().item() == pytest.approx(std, rel=2e-3)
    # The share of times below 0.3 is Phi((logit 0.3 - mean) / std).
    share = 0.5 * (1 + math.erf((math.log(0.3 / 0.7) - mean) / std / math.sqrt(2)))
    assert (times < 0.3).double().mean().item() == pytest.approx(share, abs=2e-4)
    assert (times.diff() > 0).all()


def test_logit_normal_times_on_a_table_are_nodes():
    path = ScaledLinearBetaPath()
    times = draw_times(ObjectiveConfig(prediction="v", time_sampling="logit_normal"), path, UNIFORMS)
    assert torch.equal(path.snap(times), times) and len(times.unique()) > 900


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "log_normal"])
def test_extreme_uniforms_give_usable_times(path, sampling):
    config = ObjectiveConfig(prediction="velocity", time_sampling=sampling, logit_std=3.0)
    times = draw_times(config, path, torch.tensor([0.0, 1 - 2**-24]))
    assert (times > 0).all() and (times <= 1).all() and path.d_sigma(times).isfinite().all()
    assert path.timesteps(times).isfinite().all()


@pytest.mark.parametrize("path", [EDMPath(), RectifiedFlowPath(shift=2.0), CosinePath()])
def test_log_normal_times_are_edms(path):
    config = ObjectiveConfig(prediction="edm", time_sampling="log_normal")
    times = draw_times(config, path, UNIFORMS).double()
    inside = (times > times.min()) & (times < times.max())
    logs = -path.log_snr(times) / 2
    below = torch.tensor([0.5 * (1 + math.erf((x + 1.2) / 1.2 / math.sqrt(2))) for x in (-2.0, -1.2, 0.5)])
    for limit, share in zip((-2.0, -1.2, 0.5), below.tolist(), strict=True):
        assert (logs[inside] < limit).double().sum().item() / 10000 == pytest.approx(share, abs=3e-3)


# ---------------------------------------------------------------------------------------------------- weights

NOISY_TO_CLEAN = torch.tensor([0.95, 0.6, 0.3, 0.02], dtype=torch.float64)


def config(prediction: Prediction, weighting: Weighting, **numbers: Any) -> ObjectiveConfig:
    return ObjectiveConfig(prediction=prediction, weighting=weighting, **numbers)


@pytest.mark.parametrize("table_path", [ScaledLinearBetaPath(), CosinePath()], ids=lambda path: path.kind)
def test_min_snr_as_its_paper_prints_it(table_path):
    """eps: min(SNR, g) / SNR; v: min(SNR, g) / (SNR + 1); x0: min(SNR, g)."""
    snr = (table_path.alpha(NOISY_TO_CLEAN) / table_path.sigma(NOISY_TO_CLEAN)) ** 2
    least = snr.clamp(max=5.0)
    assert (least == 5.0).any() and (least < 5.0).any()
    for prediction, expected in {"eps": least / snr, "v": least / (snr + 1), "x0": least}.items():
        found = loss_weight(config(prediction, "min_snr"), table_path, NOISY_TO_CLEAN)  # type: ignore[arg-type]
        assert torch.allclose(found, expected, rtol=1e-9), prediction


def test_soft_min_snr_has_the_same_ends():
    path = ScaledLinearBetaPath()
    snr = (path.alpha(NOISY_TO_CLEAN) / path.sigma(NOISY_TO_CLEAN)) ** 2
    found = loss_weight(config("x0", "soft_min_snr", snr_limit=4.0), path, NOISY_TO_CLEAN)
    assert torch.allclose(found, snr * 4 / (snr + 4), rtol=1e-9)
    far = torch.tensor([1.0, 0.0], dtype=torch.float64)
    hard = loss_weight(config("x0", "min_snr", snr_limit=4.0), path, far)
    assert torch.allclose(loss_weight(config("x0", "soft_min_snr", snr_limit=4.0), path, far), hard, rtol=2e-3)


def test_edms_weight_is_one_for_f_and_its_papers_for_x0(path):
    assert torch.allclose(loss_weight(config("edm", "edm"), path, NOISY_TO_CLEAN), torch.ones(4).double(), rtol=1e-9)
    edm, sigma = EDMPath(), EDMPath().sigma(NOISY_TO_CLEAN)
    printed = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    assert torch.allclose(loss_weight(config("x0", "edm"), edm, NOISY_TO_CLEAN), printed, rtol=1e-9)


@pytest.mark.parametrize("weighting", ["min_snr", "soft_min_snr", "edm"])
def test_a_weight_means_the_same_whatever_is_predicted(path, weighting):
    """w ||output - target||^2 is one number for every prediction, when all say the same x0_hat."""
    x0_hat, x0, t = torch.tensor([0.3]).double(), torch.tensor([0.8]).double(), torch.tensor([0.4]).double()
    found = {}
    for prediction in get_args(Prediction):
        slope = to_x0(prediction, torch.ones(1).double(), torch.zeros(1).double(), path, t)
        error = (x0_hat - x0) / slope  # of the output
        found[prediction] = (loss_weight(config(prediction, weighting), path, t) * error**2).item()
    assert list(found.values()) == pytest.approx([found["x0"]] * len(found), rel=1e-9)


@pytest.mark.parametrize("density", [lambda t: logit_normal_density(t, 0.3, 0.8), cosmap_density])
def test_densities_have_mass_one(density):
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    assert density(t).mean().item() == pytest.approx(1.0, abs=1e-6)


def test_weighting_uniform_times_is_drawing_logit_normal_ones():
    path, f = RectifiedFlowPath(), lambda t: (3 * t).sin()
    drawn = draw_times(ObjectiveConfig(prediction="velocity", time_sampling="logit_normal"), path, UNIFORMS)
    weight = loss_weight(config("velocity", "logit_normal"), path, UNIFORMS.double())
    assert (weight * f(UNIFORMS.double())).mean().item() == pytest.approx(f(drawn).mean().item(), abs=1e-4)


def test_cosmap_is_the_image_of_even_angles():
    """t with (1 - t) / t = cot(angle), angle even on [0, pi / 2]: the flow time of the cosine path's log-SNR."""
    angle = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000 * math.pi / 2
    t = angle.tan() / (1 + angle.tan())
    for limit in (0.2, 0.5, 0.9):
        grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000 * limit
        assert (t < limit).double().mean().item() == pytest.approx(limit * cosmap_density(grid).mean().item(), abs=1e-4)


@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_weights_are_positive_and_finite_where_it_is_trained(path, weighting):
    times = path.training_times((torch.arange(500) + 0.5) / 500)
    times = times[times < 1]
    for prediction in get_args(Prediction):
        weight = loss_weight(config(prediction, weighting), path, times)
        assert weight.shape == times.shape and weight.isfinite().all() and (weight > 0).all()


# ------------------------------------------------------------------------------------------------------ noise


def test_offset_noise_keeps_its_variance_and_moves_channels_as_a_whole():
    generator = torch.Generator().manual_seed(0)
    eps, channel = torch.randn(64, 4, 16, 16, generator=generator), torch.randn(64, 4, generator=generator)
    noise = offset_noise(eps, channel, 0.5)
    assert noise.var().item() == pytest.approx(1.0, abs=0.05)
    # A channel's mean has variance (1 / 256 + s^2) / (1 + s^2).
    assert noise.mean(dim=(2, 3)).var().item() == pytest.approx((1 / 256 + 0.25) / 1.25, rel=0.15)
    assert torch.equal(offset_noise(eps, channel, 0.0), eps)


def test_input_perturbation_adds_its_own_variance():
    generator = torch.Generator().manual_seed(0)
    eps, more = torch.randn(2, 8, 4, 16, 16, generator=generator)
    noise = input_perturbation(eps, more, 0.5)
    assert noise.var().item() == pytest.approx(1.25, rel=0.05)
    assert torch.equal(input_perturbation(eps, more, 0.0), eps)


# ------------------------------------------------------------------------------------------------------- loss


def test_loss_is_each_samples_own_mean_square():
    output, target = torch.zeros(3, 2, 4, 5), torch.zeros(3, 2, 4, 5)
    output[1] = 2.0
    output[2, 0, 0, 0] = 4.0
    assert torch.allclose(diffusion_loss(output, target), torch.tensor([0.0, 4.0, 16 / 40]))


def test_loss_is_float32_and_has_its_gradient():
    output = torch.full((2, 4, 8, 8), 1.0, dtype=torch.bfloat16, requires_grad=True)
    target = torch.full((2, 4, 8, 8), 1.001)
    loss = diffusion_loss(output, target)
    assert loss.dtype == torch.float32
    # In bfloat16 1.001 rounds to 1 and the loss would be 0.
    assert loss.tolist() == pytest.approx([1e-6, 1e-6], rel=1e-3)
    loss.sum().backward()
    assert output.grad is not None
    assert output.grad.float().flatten()[0].item() == pytest.approx(-2 * 0.001 / 256, rel=1e-2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prediction": "epsilon"}, "'epsilon' is unknown; use one of .*'eps'"),
        ({"prediction": "eps", "time_sampling": "beta"}, "'beta' is unknown; use one of .*'uniform'"),
        ({"prediction": "eps", "time_numbers": "halton"}, "'halton' is unknown; use one of .*'sobol'"),
        ({"prediction": "eps", "weighting": "p2"}, "'p2' is unknown; use one of .*'min_snr'"),
        ({"prediction": "eps", "logit_std": 0.0}, "logit_std must be above 0, not 0.0"),
        ({"prediction": "eps", "snr_limit": -5.0}, "snr_limit must be above 0, not -5.0"),
        ({"prediction": "eps", "offset_noise": -0.1}, "offset_noise must be 0 or more, not -0.1"),
    ],
)
def test_wrong_configs_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**wrong)


def test_losses_by_quantile_of_the_times():
    uniforms, losses = torch.tensor([0.1, 0.3, 0.2, 0.999, 0.25]), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    found = {name: part.tolist() for name, part in by_quantile(losses, uniforms).items()}
    assert found == {"loss_q1": [1.0, 3.0], "loss_q2": [2.0, 5.0], "loss_q3": [], "loss_q4": [4.0]}


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal", "log_normal"])
def test_times_rise_with_their_numbers_so_that_these_are_quantiles(sampling, path):
    config = ObjectiveConfig(prediction="v", time_sampling=sampling)
    times = draw_times(config, path, torch.linspace(0.001, 0.999, 400))
    assert (times.diff() >= 0).all() and times[0] < times[-1]


def test_defaults_are_the_published_ones():
    assert ObjectiveConfig(prediction="v") == ObjectiveConfig(
        prediction="v", logit_mean=0.0, logit_std=1.0, log_mean=-1.2, log_std=1.2, snr_limit=5.0, variance_weight=0.001
    )


def test_a_constant_weight_is_one(path):
    assert loss_weight(ObjectiveConfig(prediction="v"), path, torch.tensor([0.2, 0.9])).tolist() == [1.0, 1.0]


def test_the_logit_normal_density_by_torchs_distributions():
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    normal = torch.distributions.Normal(torch.tensor(-0.7).double(), torch.tensor(0.6).double())
    logistic = torch.distributions.TransformedDistribution(normal, [torch.distributions.SigmoidTransform()])
    assert torch.allclose(logit_normal_density(t, -0.7, 0.6), logistic.log_prob(t).exp(), rtol=1e-6)
    assert logit_normal_density(torch.tensor([0.0, 1.0]), -0.7, 0.6).tolist() == [0, 0]


def test_offset_noise_by_its_definition():
    eps, channel = torch.full((2, 3, 2, 2), 2.0), torch.tensor([[1.0, -1.0, 0.5], [0.0, 3.0, 2.0]])
    found = offset_noise(eps, channel, 0.3)
    assert torch.allclose(found[1, 1], torch.full((2, 2), (2 + 0.3 * 3) / 1.09**0.5))
    assert torch.allclose(found[0, 1], torch.full((2, 2), (2 - 0.3) / 1.09**0.5))
