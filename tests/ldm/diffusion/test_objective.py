"""The training objective: distribution of the times, and the loss."""

import math

import pytest
import torch

from ldm.diffusion.objective import ObjectiveConfig, diffusion_loss, draw_times
from ldm.diffusion.paths import RectifiedFlowPath, ScaledLinearBetaPath

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


@pytest.mark.parametrize("path", [RectifiedFlowPath(), ScaledLinearBetaPath()], ids=lambda path: path.kind)
@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_extreme_uniforms_give_usable_times(path, sampling):
    config = ObjectiveConfig(prediction="velocity", time_sampling=sampling, logit_std=3.0)
    times = draw_times(config, path, torch.tensor([0.0, 1 - 2**-24]))
    assert (times > 0).all() and (times <= 1).all() and path.d_sigma(times).isfinite().all()


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
        ({"prediction": "eps", "logit_std": 0.0}, "above 0, not 0.0"),
    ],
)
def test_wrong_configs_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**wrong)
