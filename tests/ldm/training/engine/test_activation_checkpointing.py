"""Recomputing changes memory, and nothing else."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ldm.denoisers import DiT, DiTConfig, UNet, UNetConfig
from ldm.denoisers.contract import Condition, Output
from ldm.training.engine.engine import recompute_blocks
from vae import AutoencoderKL, AutoencoderKLConfig

REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["new", "reentrant"])


class Found(NamedTuple):
    output: Tensor
    gradients: dict[str, Tensor]
    kept: int  # bytes of activations that the forward pass keeps for the backward pass


def run(network: nn.Module, inputs: tuple[Any, ...]) -> Found:
    """Forward and backward; what is kept beside the weights is counted where it is stored once."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(*inputs)
        output = output.prediction if isinstance(output, Output) else output
        kept = sum(storages.values())
    network.zero_grad()
    output.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return Found(output.detach(), gradients, kept)


def perturbed(network: nn.Module) -> nn.Module:
    """A fresh denoiser predicts zero, and most of its gradients are."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return network


def denoiser_inputs(channels: int = 4) -> tuple[Any, ...]:
    mask = torch.arange(7) < torch.tensor([[3], [7]])
    times = torch.tensor([3.7, 951.0])
    condition = Condition(torch.randn(2, 7, 24), mask, torch.randn(2, 24))
    return torch.randn(2, channels, 16, 16), times, condition


def dit() -> tuple[nn.Module, tuple[Any, ...]]:
    config = DiTConfig(depth=6, width=32, heads=2, sample_size=16)
    return DiT(config, latent_channels=4, context_width=24), denoiser_inputs()


def unet() -> tuple[nn.Module, tuple[Any, ...]]:
    config = UNetConfig(
        block_out_channels=(16, 32), layers_per_block=2, attention_levels=(True, True), heads=2, norm_num_groups=8
    )
    return UNet(config, latent_channels=4, context_width=24), denoiser_inputs()


class Reconstruction(nn.Module):
    """The autoencoder as it is trained: there and back, by the mean."""

    def __init__(self) -> None:
        super().__init__()
        config = AutoencoderKLConfig(block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4)
        self.vae = AutoencoderKL(config)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vae.decode(self.vae.encode(pixels).mean)


def autoencoder() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Reconstruction(), (torch.randn(2, 3, 32, 32),)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
        return x + scale * self.dropout(torch.tanh(self.layer(x)))


class Named(nn.Module):
    """Its blocks draw random numbers, and share a tensor that is given by name and has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first: nn.Module = nn.Linear(8, 8)
        self.scale: nn.Module = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        scale, x = self.scale(x), self.first(x)
        for block in self.blocks:
            x = block(x, scale=scale)
        return x


def named() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Named(), (torch.randn(32, 8),)


# The share of the bytes that is kept at most.
NETWORKS: dict[str, tuple[Callable[[], tuple[nn.Module, tuple[Tensor, ...]]], float]] = {
    "dit": (dit, 0.25),
    "unet": (unet, 0.5),
    "autoencoder": (autoencoder, 0.5),
    "named": (named, 0.6),
}


@pytest.mark.parametrize("name", NETWORKS)
@REENTRANT
def test_the_same_is_learned_with_less_memory(name: str, reentrant: bool):
    torch.manual_seed(0)
    build, share = NETWORKS[name]
    network, inputs = build()
    perturbed(network)
    twin = copy.deepcopy(network)
    recompute_blocks(twin, reentrant=reentrant)
    expected, found = run(network, inputs), run(twin, inputs)
    assert torch.equal(found.output, expected.output)
    assert found.gradients.keys() == expected.gradients.keys()
    assert len(found.gradients) == len(list(network.parameters()))
    for key, gradient in expected.gradients.items():
        assert gradient.abs().max() > 0, key
        torch.testing.assert_close(found.gradients[key], gradient, msg=key)
    assert found.kept < share * expected.kept, f"{found.kept} of {expected.kept} bytes are kept"


@pytest.mark.parametrize("name", NETWORKS)
def test_names_and_weights_are_those_of_before(name: str):
    """Checkpoints and exports know nothing of it."""
    network, _ = NETWORKS[name][0]()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    modules = [key for key, _ in network.named_modules()]
    assert recompute_blocks(network, reentrant=False)
    after = network.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert [key for key, _ in network.named_modules()] == modules


def test_blocks_are_whole_blocks_and_none_lies_in_another():
    for build, kinds in [
        (dit, {"DiTBlock"}),
        (unet, {"ResBlock", "TransformerBlock", "Downsample", "Upsample"}),
        (autoencoder, {"ResnetBlock", "Attention", "Downsample", "Upsample"}),
    ]:
        blocks = recompute_blocks(build()[0], reentrant=False)
        assert {type(block).__name__ for block in blocks} == kinds
        assert len(set(map(id, blocks))) == len(blocks)
        assert not any(other in set(block.modules()) for block in blocks for other in blocks if other is not block)


@REENTRANT
def test_the_way_that_is_asked_for_is_taken(reentrant: bool, monkeypatch: pytest.MonkeyPatch):
    """They differ only in what they allow others to do to weights between the passes, as ZeRO 3 does."""
    taken = []
    noted = lambda *_, use_reentrant, **__: taken.append(use_reentrant)  # noqa: E731
    monkeypatch.setattr("ldm.training.engine.engine.checkpoint", noted)
    block = Block()
    recompute_blocks(nn.Sequential(nn.ModuleList([block])), reentrant=reentrant)
    block(torch.ones(8, requires_grad=True), scale=torch.ones(()))
    assert taken == [reentrant]


@REENTRANT
def test_where_nothing_is_learned_nothing_is_said(reentrant: bool):
    """PyTorch's older way warns of gradients that nobody asked for."""
    network, inputs = dit()
    expected = network(*inputs).prediction
    recompute_blocks(network, reentrant=reentrant)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        assert torch.equal(network(*inputs).prediction, expected)


@pytest.mark.parametrize(
    "network",
    [nn.Linear(2, 2), nn.ModuleDict({"list": nn.ModuleList()}), nn.ModuleList([nn.Linear(2, 2), nn.GELU()])],
    ids=["no list", "an empty list", "single layers"],
)
def test_a_network_without_blocks_is_refused(network: Any):
    with pytest.raises(ValueError, match=f"engine.recompute: {type(network).__name__} has no list of blocks"):
        recompute_blocks(network, reentrant=False)


@REENTRANT
def test_the_first_block_learns_though_its_input_does_not(reentrant: bool):
    """PyTorch's older way gives no gradient to a block none of whose inputs has one."""
    network = Named()
    network.first, network.scale = nn.Identity(), nn.Identity()
    recompute_blocks(network, reentrant=reentrant)
    assert len(run(network, (torch.randn(32, 8),)).gradients) == len(list(network.parameters())) == 8
