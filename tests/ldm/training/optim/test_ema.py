"""Exponential moving average: closed form, float32 shadows of bfloat16 weights, state."""

import copy

import pytest
import torch
from torch import nn

from ldm.training.optim.averages import EMA, WarmedUp


def test_closed_form_towards_a_constant():
    """From 0 towards 1: 1 - shadow is the product of the decays, each min(decay, (1 + n) / (10 + n))."""
    value = nn.Parameter(torch.zeros(3))
    ema = EMA([("w", value)], WarmedUp(0.9))
    value.data.fill_(1.0)
    remaining = 1.0
    for n in range(1, 201):
        ema.update([("w", value)])
        remaining *= min(0.9, (1 + n) / (10 + n))
        assert ema.shadow["w"].tolist() == pytest.approx([1 - remaining] * 3, rel=1e-5)
        if n == 1:
            assert ema.shadow["w"][0].item() == pytest.approx(1 - 2 / 11)
    # (1 + n) / (10 + n) reaches 0.9 at n = 80: before it warms up, after it the decay is constant.
    assert remaining < 0.9**120


def test_weighted_sum_of_moving_weights():
    ema = EMA([("a", torch.tensor([0.0])), ("b", torch.zeros(2, 2))], WarmedUp(0.25))
    for value in (1.0, 2.0, 4.0):
        ema.update([("b", torch.full((2, 2), -value)), ("a", torch.tensor([value]))])
    # Decays 2/11, 1/4, 1/4.
    expected = 1.0 * 9 / 11 / 16 + 2.0 * 3 / 16 + 4.0 * 3 / 4
    assert ema.shadow["a"].item() == pytest.approx(expected)
    assert torch.allclose(ema.shadow["b"], torch.full((2, 2), -expected))


def test_bfloat16_weights_still_move_it():
    weight = torch.full((4,), 1.0, dtype=torch.bfloat16)
    ema = EMA([("w", weight)], WarmedUp(0.9999))
    ema.updates = 10**6  # long after warm-up
    target = torch.full((4,), 1.25, dtype=torch.bfloat16)
    for _ in range(100):
        ema.update([("w", target)])
    assert ema.shadow["w"].dtype == torch.float32
    assert ema.shadow["w"][0].item() == pytest.approx(1 + 0.25 * (1 - 0.9999**100), rel=1e-5)
    stuck = weight.clone()
    for _ in range(100):
        stuck.lerp_(target, 1e-4)
    assert torch.equal(stuck, weight), "this test shows nothing if bfloat16 moves too"


def test_shadows_are_copies_and_weights_are_left_alone():
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model.state_dict())
    ema = EMA(model.named_parameters(), WarmedUp(0.5))
    nn.init.zeros_(model.weight)
    assert torch.equal(ema.shadow["weight"], before["weight"])
    ema.update(model.named_parameters())
    assert not model.weight.any() and not ema.shadow["weight"].requires_grad
    assert model.weight.grad is None and model.weight.requires_grad


def test_resumed_average_goes_on_as_if_never_stopped():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(10, 5, generator=generator)
    whole = EMA([("w", values[0])], WarmedUp(0.99))
    for value in values[1:]:
        whole.update([("w", value)])

    first = EMA([("w", values[0])], WarmedUp(0.99))
    for value in values[1:4]:
        first.update([("w", value)])
    second = EMA([("w", torch.zeros(5))], WarmedUp(0.99))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for value in values[4:]:
        second.update([("w", value)])
    assert second.updates == 9 and torch.equal(second.shadow["w"], whole.shadow["w"])
    assert first.updates == 3


def test_loading_copies():
    source, sink = EMA([("w", torch.ones(2))], WarmedUp(0.5)), EMA([("w", torch.zeros(2))], WarmedUp(0.5))
    sink.load_state_dict(source.state_dict())
    sink.update([("w", torch.zeros(2))])
    assert torch.equal(source.shadow["w"], torch.ones(2))


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_impossible_decay_is_refused(decay):
    with pytest.raises(ValueError, match=str(decay)):
        EMA([("w", torch.zeros(1))], WarmedUp(decay))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": torch.zeros(2)}, r"other tensors, 1 missing \(b\): use"),
        (
            {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)},
            r"other tensors, 1 unexpected \(c\): use",
        ),
        ({"a": torch.zeros(2), "b": torch.zeros(1)}, r"1 of another shape \(b \(1,\) for \(2,\)\)"),
    ],
)
def test_other_models_are_refused_and_change_nothing(values, message):
    ema = EMA([("a", torch.ones(2)), ("b", torch.ones(2))], WarmedUp(0.5))
    with pytest.raises(ValueError, match=message):
        ema.update(values.items())
    with pytest.raises(ValueError, match=message):
        ema.load_state_dict({"updates": 5, "shadow": values})
    assert ema.updates == 0 and torch.equal(ema.shadow["a"], torch.ones(2))
