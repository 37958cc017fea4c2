"""The same training under every ZeRO stage, on one rank or two, whole or in parts; and what is not finite."""

from typing import Any

import pytest
import torch
from helpers.engine_worker import batch_at, network
from torch import nn

from ldm.training.optim.averages import EMA, PowerProfile, WarmedUp

STAGES = range(4)


def near(found: Any, expected: Any, tolerance: float) -> None:
    for average in ("ema", "power"):
        assert found[average].keys() == expected[average].keys()
        for name, values in expected[average].items():
            assert found[average][name] == pytest.approx(values, abs=tolerance), (average, name)
    assert found["shapes"] == expected["shapes"]


def test_the_loss_falls(one):
    losses = one["zero0"]["losses"]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("stage", STAGES)
def test_every_zero_stage_is_the_same_training_on_one_rank_and_on_two(stage, one, two):
    for found in (one[f"zero{stage}"], two[f"zero{stage}"]):
        assert found["losses"] == pytest.approx(one["zero0"]["losses"], abs=1e-6)
        near(found, one["zero0"], 1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_muon_too_is_the_same_training_where_its_matrices_are_cut_up(stage, one, two):
    """On two ranks, under ZeRO 1 and 2, rank 0 owns a part of the first matrix and nothing of the second."""
    expected = one["muon0"]
    for found in (one[f"muon{stage}"], two[f"muon{stage}"]):
        assert (found["step"], found["position"]) == (8, 10)
        near(found, expected, 1e-6)
    assert expected["losses"] != pytest.approx(one["zero0"]["losses"], abs=1e-3, nan_ok=True)
    assert expected["losses"][-1] < 0.9 * expected["losses"][0]


@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_keeps_its_part_of_the_average(stage, one, two):
    """Half of the elements each, but for what padding and flattening shift: no rank holds all of them."""
    whole = one[f"zero{stage}"]["held"]
    assert whole == sum(torch.Size(shape).numel() for name, shape in one["zero0"]["shapes"].items() if name != "shift")
    assert 0.4 * whole < two[f"zero{stage}"]["held"] < 0.6 * whole


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_in_parts_is_the_same_step(stage, one, two):
    for found in (one[f"parts{stage}"], two[f"parts{stage}"]):
        near(found, one["spoiled0"], 1e-6)


def reference_averages(batches: int, skipped: set[int]) -> dict[str, dict[str, torch.Tensor]]:
    """AdamW, clipping, the plain and the power-function average in float64, by PyTorch alone."""
    net = network(33).double()
    decayed = [p for p in net.parameters() if p.ndim >= 2]
    others = [p for p in net.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.999), foreach=False)
    profiles = {"ema": WarmedUp(0.9), "power": PowerProfile(0.1)}
    averages = {name: {n: p.detach().clone() for n, p in net.named_parameters()} for name in profiles}
    updates = 0
    for position in range(batches):
        if position in skipped:
            continue
        x, y = batch_at(position)
        optimizer.zero_grad()
        (net(x.double()) - y.double()).square().mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        updates += 1
        for name, profile in profiles.items():
            for n, p in net.named_parameters():
                averages[name][n].lerp_(p.detach(), 1 - profile(updates))
    return averages


@pytest.mark.parametrize("stage", STAGES)
def test_the_averages_are_those_of_float64_after_skipped_steps_too(stage, two):
    """50 steps on two ranks, with no tensor kept whole under ZeRO 3, and two batches that were skipped."""
    found = two[f"ema50_{stage}"]
    assert (found["step"], found["position"]) == (50, 52)
    for name, expected in reference_averages(52, {3, 6}).items():
        for key, tensor in expected.items():
            assert found[name][key] == pytest.approx(tensor.flatten().tolist(), abs=1e-6), (name, key)


def test_the_reference_is_an_average_of_this_kind():
    """The formula above against the class that is trained with, on values that move."""
    shadow = EMA([("w", torch.zeros(3))], WarmedUp(0.9))
    expected, value = torch.zeros(3, dtype=torch.float64), torch.zeros(3)
    for n in range(1, 30):
        value = value + torch.tensor([0.1, 0.2, -0.3])
        shadow.update([("w", value)])
        expected.lerp_(value.double(), 1 - WarmedUp(0.9)(n))
    assert torch.allclose(shadow.shadow["w"].double(), expected, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("way", ["spoiled", "parts"])
def test_what_is_not_finite_moves_nothing(way, stage, one):
    """As if its batches had not been there: the same averages, learning rates and counters."""
    found = one[f"{way}{stage}"]
    assert found["faults"][0] == "the loss is nan" and "gradient" in found["faults"][1]
    assert found["bad_ranks"] == [[0], []]
    assert (found["step"], found["position"]) == (10, 12)
    for name, expected in reference_averages(12, {3, 6}).items():
        for key, tensor in expected.items():
            assert found[name][key] == pytest.approx(tensor.flatten().tolist(), abs=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_all_ranks_know_which_of_them_met_what_is_not_finite(stage, two):
    """The spoiled sample is the last of the batch: rank 1's."""
    found = two[f"ema50_{stage}"]
    assert found["bad_ranks"] == [[1], []]
    assert found["faults"][0] == "the loss is nan" and "gradient" in found["faults"][1]


def test_ten_spoiled_batches_in_a_row_stop_the_run(one):
    error = one["hopeless"]["error"]
    assert error.startswith("NonFiniteError: the loss is nan at step 3, as in each of the last 10 batches")


def test_two_processes_in_bfloat16_are_the_same_training_as_one(one, two):
    expected = one["bf16"]
    assert expected["losses"] != pytest.approx(one["zero0"]["losses"], abs=1e-6)
    assert expected["losses"] == pytest.approx(one["zero0"]["losses"], abs=2e-2)
    for stage in (1, 2, 3):
        found = two[f"bf16_{stage}"]
        assert found["dtypes"] == expected["dtypes"] == ["torch.bfloat16", "{torch.float32}"]
        assert found["losses"] == pytest.approx(expected["losses"], abs=3e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_float16_scales_its_loss_and_skips_what_overflows(stage, one, two):
    """At 2^16 times 10^6 every gradient overflows; half the scale after that, and no other trace."""
    found = two[f"fp16_{stage}"]
    assert len(found["faults"]) == 1 and "gradient" in found["faults"][0]
    assert found["scales"] == [2.0**16] * 4 + [2.0**15] * 6
    assert found["step"] == 9 and found["position"] == 10
    kept = [loss for position, loss in enumerate(one["zero0"]["losses"]) if position < 4]
    assert found["losses"][:4] == pytest.approx(kept, abs=2e-3)
    assert found["dtypes"][0] == "torch.float16"


def test_a_clipped_gradient_moves_less(one):
    """So far that it is small against AdamW's epsilon, which otherwise would make up for its length."""

    def moved(name: str) -> float:
        pairs = zip(one[name]["ema"]["head.weight"], one["start"]["ema"]["head.weight"], strict=True)
        return sum(abs(a - b) for a, b in pairs)

    assert moved("clipped") < 0.1 * moved("zero0")


def test_ranks_share_their_numbers(one, two):
    assert one["world"]["means"] == {"rank": 0, "uneven": 0}
    assert two["world"]["means"] == {"rank": 0.5, "uneven": 0.75}
    assert one["world"]["gathered"] == [[0, 1]] and two["world"]["gathered"] == [[0, 1], [1, 1]]
    assert one["world"]["agreed"] == [True, False] and two["world"]["agreed"] == [True, True]
    assert one["world"]["total"] == 2 and two["world"]["total"] == 5
    assert one["world"]["uneven_in_order"] == [[0, 0], [2, -2]]
    assert two["world"]["uneven_in_order"] == [[0, 0], [1, -1], [2, -2]]
    assert one["world"]["the_last_ranks"] == two["world"]["the_last_ranks"] == [[0, 0], [2, -2]]
    assert one["zero0"]["wished"] == [True, False, False] and two["zero0"]["wished"] == [True, True, False]
