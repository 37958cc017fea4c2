"""The optimisers: which weights are decayed, and Muon beside AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.training.engine.config import OptimConfig
from ldm.training.optim.muon import Cut, Join, linear_maps, muon_step, uncut


def parameter_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Biases and what scales norms are never decayed; a group that would be empty is left out."""
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(network: nn.Module, config: OptimConfig) -> Optimizer:
    parameters = [p for p in network.parameters() if p.requires_grad]
    if config.optimizer == "muon":
        return MuonAndAdamW(linear_maps(network), parameters, config)
    return adamw(parameters, config)


def adamw(parameters: Sequence[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    # Fused AdamW takes a quarter of the time of the plain one on a CPU.
    groups = parameter_groups(parameters, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


class MuonAndAdamW(Optimizer):
    """Muon for the weights of linear maps, AdamW for all others, as one optimiser: groups and state of both.

    DeepSpeed puts flat tensors in the places of weights: `cuts` then tells where the matrices are in them.
    """

    def __init__(
        self, matrices: Sequence[nn.Parameter], parameters: Sequence[nn.Parameter], config: OptimConfig
    ) -> None:
        """matrices: those of the parameters that are Muon's. Raises ValueError if there is none."""
        if not matrices:
            raise ValueError("optim.optimizer is muon, but this network has no linear layer to train: use adamw")
        self.matrices = set(matrices)
        super().__init__(parameters, {"lr": config.lr})
        others = [p for p in parameters if p not in self.matrices]
        self._adamw = adamw(others, config) if others else None
        muon = {"params": list(matrices), "lr": config.lr, "weight_decay": config.weight_decay}
        muon["momentum"] = config.muon_momentum
        self.param_groups = [muon, *(self._adamw.param_groups if self._adamw else [])]
        self.cuts = {p: [Cut(p.shape, 0, 0, p.numel())] for p in matrices}
        self._join: Join = uncut

    def lay_out(self, cuts: dict[Tensor, list[Cut]], join: Join) -> None:
        """Say which parts of which matrices each tensor holds that Muon is going to move, in the same order on every
        rank."""
        self.cuts, self._join = cuts, join

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Of the groups that are in param_groups just now: DeepSpeed takes one after the other."""
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
    """What the optimiser remembers of a tensor that it moves, made as its first step would, if it has not been yet."""
    state = optimizer.state[home]
    if not state:
        if isinstance(optimizer, MuonAndAdamW) and home in optimizer.cuts:
            state["momentum_buffer"] = torch.zeros_like(home)
        else:
            state["step"] = torch.zeros((), device=home.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(home), torch.zeros_like(home)
    return state


def set_step(state: dict[str, Any], step: int) -> None:
    """How many steps the optimiser has taken, which AdamW's bias correction depends on."""
    if "step" in state:
        state["step"].fill_(step)
