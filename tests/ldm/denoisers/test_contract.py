"""What every registered denoiser keeps to."""

from typing import Any

import pytest
import torch

from ldm.denoisers import DENOISERS, Condition, DenoiserConfig, Output

# A kind that is not listed here is tested as its configuration's defaults make it.
SMALL: dict[str, dict[str, Any]] = {
    "dit": {"depth": 1, "width": 32, "heads": 2, "sample_size": 8},
    "unet": {
        "block_out_channels": (16, 32), "layers_per_block": 1, "attention_levels": (True, False), "heads": 2,
        "norm_num_groups": 8,
    },
}  # fmt: skip
CONFIGS = [DENOISERS[kind](**SMALL.get(kind, {})) for kind in DENOISERS]
each_kind = pytest.mark.parametrize("config", CONFIGS, ids=DENOISERS)


def condition(concat: torch.Tensor | None = None) -> Condition:
    return Condition(torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 12), concat)


@each_kind
def test_a_fresh_network_predicts_exactly_zero(config: DenoiserConfig):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    output = config.build(latent_channels=4, context_width=12)(x, t, condition())
    assert isinstance(output, Output) and output.variance is None
    assert torch.equal(output.prediction, torch.zeros_like(x))


@each_kind
def test_a_learned_variance_is_a_second_answer(config: DenoiserConfig):
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0])
    network = config.build(latent_channels=4, context_width=12, learned_variance=True)
    output = network(x, t, condition())
    assert output.variance is not None and output.variance.shape == output.prediction.shape == x.shape
    assert (network.in_channels, network.out_channels) == (4, 8)


@each_kind
def test_further_channels_are_seen(config: DenoiserConfig):
    torch.manual_seed(0)
    network = config.build(latent_channels=4, context_width=12, concat_channels=5)
    assert (network.in_channels, network.out_channels) == (9, 4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        x, t, told = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 900.0]), condition()
        answers = [network(x, t, told._replace(concat=concat)).prediction for concat in torch.randn(2, 2, 5, 8, 8)]
    assert answers[0].shape == x.shape and not torch.equal(*answers)


@each_kind
def test_its_facts(config: DenoiserConfig):
    assert config.native_side in (None, 8) and 8 % config.stride == 0
    assert 1 <= config.attention_length(8) <= 64
    assert config.describe(12).startswith("a ")
