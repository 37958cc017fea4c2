"""Which weights are decayed, Muon beside AdamW, and an optimiser's state before its first step."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from ldm.denoisers.dit import DiTConfig
from ldm.training.engine.config import OptimConfig
from ldm.training.optim.optimizers import (
    MuonAndAdamW,
    ParameterGroup,
    adamw,
    build_optimizer,
    decay_groups,
    prepare_state,
    set_step,
)

Kind = Literal["adamw", "muon"]
KINDS = pytest.mark.parametrize("kind", ["adamw", "muon"])
STEPS = 5


def make_network() -> nn.Module:
    """Matrices of either shape, and what is none: convolutions, biases, a norm, a table."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 4), nn.Conv1d(4, 3, 2))
    network.register_parameter("table", nn.Parameter(torch.randn(2, 3, 4)))
    return network


DECAYED = {"0.weight", "2.weight", "3.weight"}


def config(kind: Kind = "adamw", **settings: Any) -> OptimConfig:
    values: dict[str, Any] = {"optimizer": kind, "lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    values |= {"muon_momentum": 0.9} | settings
    return OptimConfig(**values)


def set_gradients(network: nn.Module, step: int) -> None:
    drawn = torch.Generator().manual_seed(step)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=drawn)


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        other = found[key]
        if isinstance(value, Tensor):
            assert (other.shape, other.dtype, other.device) == (value.shape, value.dtype, value.device), key
            assert torch.equal(other, value), key
        else:
            assert other == value, key


def decays(network: nn.Module, kind: Kind) -> dict[str, float]:
    """The weight decay of each parameter, by its name."""
    names = {id(p): name for name, p in network.named_parameters()}
    groups = build_optimizer(network, config(kind)).param_groups
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


@KINDS
def test_weights_of_layers_alone_are_decayed(kind: Kind):
    """Not biases, norms and tables, whatever their shape."""
    network = make_network()
    expected = {name: 0.1 if name in DECAYED else 0.0 for name, _ in network.named_parameters()}
    assert decays(network, kind) == expected


@KINDS
def test_no_embedding_and_no_table_of_a_dit_is_decayed(kind: Kind):
    network = DiTConfig(width=12, depth=1, heads=2, sample_size=4).build(
        latent_channels=4, context_width=8, learned_variance=False
    )
    found = decays(network, kind)
    assert {name for name in found if name.endswith("scale_shift_table")} == {
        "scale_shift_table",
        "transformer_blocks.0.scale_shift_table",
    }
    for name, module in network.named_modules():
        own = {f"{name}.{key}".lstrip("."): p for key, p in module.named_parameters(recurse=False)}
        layer = isinstance(module, nn.Linear | nn.Conv2d)
        assert {key: found[key] for key in own} == {
            key: 0.1 if layer and key.endswith("weight") else 0.0 for key in own
        }


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_an_empty_group_is_left_out(decay: float):
    """DeepSpeed stumbles over it."""
    weight = nn.Parameter(torch.ones(2, 2))
    (group,) = decay_groups(ParameterGroup([weight]), {weight} if decay else (), 0.1)
    assert group["weight_decay"] == decay and group["params"] == [weight]


@KINDS
def test_decay_shrinks_the_decayed_weights_alone(kind: Kind):
    network = make_network()
    before = weights_of(network)
    optimizer = build_optimizer(network, config(kind))
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, weight in weights_of(network).items():
        factor = 1 - 0.01 * 0.1 * (name in DECAYED)
        torch.testing.assert_close(weight, factor * before[name], msg=name)


@KINDS
def test_frozen_weights_are_left_alone(kind: Kind):
    network = make_network()
    network.get_parameter("0.weight").requires_grad_(False)
    optimizer = build_optimizer(network, config(kind))
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert owned == {id(p) for name, p in network.named_parameters() if name != "0.weight"}


@KINDS
def test_groups_keep_their_own_learning_rates(kind: Kind):
    """The engine multiplies the learning rate of each group by its lr_scale."""
    network = make_network()
    slow = ParameterGroup(list(network.get_submodule("0").parameters()), 0.1)
    fast = ParameterGroup([p for name, p in network.named_parameters() if not name.startswith("0.")])
    optimizer = build_optimizer(network, config(kind), [slow, fast])
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    expected = {id(p): 0.1 if name.startswith("0.") else 1.0 for name, p in network.named_parameters()}
    assert scales == expected


def test_muon_and_adamw_as_one_are_both_by_themselves():
    network, twin = make_network(), make_network()
    settings = config("muon")
    both = build_optimizer(network, settings)
    matrices = [p for p in twin.parameters() if p.ndim == 2]
    muon = torch.optim.Muon(matrices, lr=settings.lr, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    alone = adamw(twin, [ParameterGroup([p for p in twin.parameters() if p.ndim != 2])], settings)
    for step in range(STEPS):
        for group in [*both.param_groups, *muon.param_groups, *alone.param_groups]:
            group["lr"] = 0.01 / (step + 1)  # as the engine does
        set_gradients(network, step)
        set_gradients(twin, step)
        both.step()
        muon.step()
        alone.step()
    expected, began = weights_of(twin), weights_of(make_network())
    assert_same(weights_of(network), expected)
    assert all(not torch.equal(expected[name], began[name]) for name in began)


def test_muon_and_adamw_share_groups_and_state_with_nobody_left_out():
    network = make_network()
    both = build_optimizer(network, config("muon"))
    assert isinstance(both, MuonAndAdamW)
    assert {id(p) for group in both.param_groups for p in group["params"]} == {id(p) for p in network.parameters()}
    set_gradients(network, 0)
    both.step()
    assert set(both.state) == set(network.parameters())
    both.zero_grad()
    assert all(p.grad is None for p in network.parameters())


def test_muon_where_there_is_nothing_for_it_is_refused():
    with pytest.raises(ValueError, match="this network has no linear layer to train: use adamw"):
        build_optimizer(nn.Conv2d(2, 2, 3), config("muon"))


def test_muon_alone_where_all_weights_are_matrices():
    network = nn.Linear(3, 4, bias=False)
    optimizer = build_optimizer(network, config("muon"))
    set_gradients(network, 0)
    optimizer.step()
    assert optimizer.state[network.weight].keys() == {"momentum_buffer"}


@KINDS
def test_a_prepared_state_is_that_of_a_fresh_first_step(kind: Kind):
    """A checkpoint of step 0, or of weights that a step has not met, holds what such a step would have made."""
    network, twin = make_network(), make_network()
    prepared, fresh = (build_optimizer(n, config(kind)) for n in (network, twin))
    for p in network.parameters():
        prepare_state(prepared, p)
    assert not fresh.state
    for step in range(STEPS):
        set_gradients(network, step)
        set_gradients(twin, step)
        prepared.step()
        fresh.step()
        assert_same(weights_of(network), weights_of(twin))
        for p, other in zip(network.parameters(), twin.parameters(), strict=True):
            assert_same(prepared.state[p], fresh.state[other])


@KINDS
def test_preparing_changes_no_state_that_there_is(kind: Kind):
    network = make_network()
    optimizer = build_optimizer(network, config(kind))
    set_gradients(network, 0)
    optimizer.step()
    before = {p: copy.deepcopy(optimizer.state[p]) for p in network.parameters()}
    for p in network.parameters():
        assert prepare_state(optimizer, p) is optimizer.state[p]
        assert_same(optimizer.state[p], before[p])


@KINDS
def test_moments_and_the_number_of_steps_are_all_that_is_remembered(kind: Kind):
    """As a checkpoint gives them back: into a prepared state, without a look at its other entries."""
    network = make_network()
    optimizer = build_optimizer(network, config(kind))
    for step in range(STEPS):
        set_gradients(network, step)
        optimizer.step()
    twin = copy.deepcopy(network)
    resumed = build_optimizer(twin, config(kind))
    for p, other in zip(network.parameters(), twin.parameters(), strict=True):
        state = prepare_state(resumed, other)
        for name, value in optimizer.state[p].items():
            if value.shape == p.shape:
                state[name].copy_(value)
        set_step(state, STEPS)
        assert_same(state, optimizer.state[p])
    for one, its in ((network, optimizer), (twin, resumed)):
        set_gradients(one, STEPS)
        its.step()
    assert_same(weights_of(twin), weights_of(network))


def test_a_state_that_counts_nothing_is_not_given_a_number():
    state = {"momentum_buffer": torch.ones(2)}
    set_step(state, 7)
    assert state.keys() == {"momentum_buffer"}
