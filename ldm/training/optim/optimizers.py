"""Build the optimisers: select the weights to decay, and combine Muon with AdamW."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.training.engine.config import OptimConfig
from ldm.training.optim.muon import Cut, Join, linear_maps, muon_step, uncut


class ParameterGroup(NamedTuple):
    """Parameters that share a learning rate."""

    parameters: Sequence[nn.Parameter]
    lr_scale: float = 1.0  # times optim.lr

    def of(self, chosen: Callable[[nn.Parameter], bool]) -> ParameterGroup:
        """Those that are chosen."""
        return ParameterGroup([p for p in self.parameters if chosen(p)], self.lr_scale)


def decayed_weights(network: nn.Module) -> Container[nn.Parameter]:
    """Collect the weights of linear layers and convolutions. Biases, norms, embeddings and tables are not decayed."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return {m.weight for m in network.modules() if isinstance(m, convolutions)} | set(linear_maps(network))


def decay_groups(group: ParameterGroup, decayed: Container[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Divide a group into the weights to decay and all others. Empty groups are left out."""
    divided = [(group.of(lambda p: p in decayed), weight_decay), (group.of(lambda p: p not in decayed), 0.0)]
    return [
        {"params": list(part.parameters), "weight_decay": decay, "lr_scale": part.lr_scale}
        for part, decay in divided
        if part.parameters
    ]


def build_optimizer(
    network: nn.Module, config: OptimConfig, groups: Sequence[ParameterGroup] | None = None
) -> Optimizer:
    """The optimiser that the configuration names. groups: of all trained parameters; None: one of them all."""
    groups = groups or [ParameterGroup([p for p in network.parameters() if p.requires_grad])]
    if config.optimizer == "muon":
        return MuonAndAdamW(network, groups, config)
    return adamw(network, groups, config)


def adamw(network: nn.Module, groups: Sequence[ParameterGroup], config: OptimConfig) -> torch.optim.AdamW:
    # On a CPU, fused AdamW takes a quarter of the time of the plain one.
    decayed = decayed_weights(network)
    parameters = [found for group in groups for found in decay_groups(group, decayed, config.weight_decay)]
    return torch.optim.AdamW(parameters, lr=config.lr, betas=config.betas, fused=True)


class MuonAndAdamW(Optimizer):
    """One optimiser with the groups and state of both: Muon for the weights of linear layers, AdamW for all others.

    DeepSpeed replaces weights by flat tensors: `cuts` then locates the matrices in them.
    """

    def __init__(self, network: nn.Module, groups: Sequence[ParameterGroup], config: OptimConfig) -> None:
        """Raises ValueError if the network has no weights for Muon."""
        matrices = linear_maps(network)
        if not matrices:
            raise ValueError("optim.optimizer is muon, but this network has no linear layer to train: use adamw")
        self.matrices = set(matrices)
        super().__init__([p for group in groups for p in group.parameters], {"lr": config.lr})
        others = [found for group in groups if (found := group.of(lambda p: p not in self.matrices)).parameters]
        self._adamw = adamw(network, others, config) if others else None
        own = [found for group in groups if (found := group.of(self.matrices.__contains__)).parameters]
        settings = {"lr": config.lr, "weight_decay": config.weight_decay, "momentum": config.muon_momentum}
        muon = [{"params": list(group.parameters), "lr_scale": group.lr_scale} | settings for group in own]
        self.param_groups = [*muon, *(self._adamw.param_groups if self._adamw else [])]
        self.cuts = {p: [Cut(p.shape, 0, 0, p.numel())] for p in matrices}
        self._join: Join = uncut

    def lay_out(self, cuts: dict[Tensor, list[Cut]], join: Join) -> None:
        """Set which parts of which matrices each of Muon's tensors contains, in the same order on every rank."""
        self.cuts, self._join = cuts, join

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step the groups currently in param_groups: DeepSpeed passes one at a time."""
        assert closure is None
        for group in self.param_groups:
            if "momentum" not in group:
                continue
            how = {"lr": group["lr"], "weight_decay": group["weight_decay"], "beta": group["momentum"]}
            for home in group["params"]:
                if home.grad is not None:
                    momentum = prepare_state(self, home)["momentum_buffer"]
                    muon_step(home, momentum, self.cuts[home], self._join, **how)
        if self._adamw is not None:
            self._adamw.state = self.state
            self._adamw.param_groups = [group for group in self.param_groups if "momentum" not in group]
            self._adamw.step()


def prepare_state(optimizer: Optimizer, home: Tensor) -> dict[str, Any]:
    """Return the optimiser's state of a tensor, created as in its first step if there is none yet."""
    state = optimizer.state[home]
    if not state:
        if isinstance(optimizer, MuonAndAdamW) and home in optimizer.cuts:
            state["momentum_buffer"] = torch.zeros_like(home)
        else:
            state["step"] = torch.zeros((), device=home.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(home), torch.zeros_like(home)
    return state


def set_step(state: dict[str, Any], step: int) -> None:
    """Set the number of steps taken, on which AdamW's bias correction depends."""
    if "step" in state:
        state["step"].fill_(step)
