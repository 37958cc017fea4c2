"""The optimisers: which weights are decayed, and Muon beside AdamW."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldm.engine_config import OptimConfig


def parameter_groups(parameters: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Biases and what scales norms are never decayed; a group that would be empty is left out."""
    decayed = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(network: nn.Module, config: OptimConfig, *, zero_stage: int) -> Optimizer:
    """Raises ValueError for Muon where ZeRO cuts matrices up."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    if config.optimizer == "muon":
        if zero_stage > 0:
            raise ValueError(
                f"optim.optimizer is muon, which needs whole matrices, but engine.zero_stage is {zero_stage}: set it "
                "to 0, or use adamw"
            )
        return MuonAndAdamW(parameters, config)
    return adamw(parameters, config)


def adamw(parameters: Sequence[nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    # Fused AdamW takes a quarter of the time of the plain one on a CPU.
    groups = parameter_groups(parameters, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


class MuonAndAdamW(Optimizer):
    """Muon for the weights that are matrices, AdamW for all others, as one optimiser: groups and state of both."""

    def __init__(self, parameters: Sequence[nn.Parameter], config: OptimConfig) -> None:
        matrices = [p for p in parameters if p.ndim == 2]
        others = [p for p in parameters if p.ndim != 2]
        super().__init__(parameters, {"lr": config.lr})
        muon = torch.optim.Muon(
            matrices,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.muon_momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        self._parts: list[Optimizer] = [muon, *([adamw(others, config)] if others else [])]
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        for part in self._parts:
            part.step()


def prepare_state(optimizer: Optimizer, home: Tensor) -> dict[str, Any]:
    """What the optimiser remembers of a tensor that it moves, made as its first step would, if it has not been yet."""
    state = optimizer.state[home]
    if not state:
        if isinstance(optimizer, MuonAndAdamW) and home.ndim == 2:
            state["momentum_buffer"] = torch.zeros_like(home)
        else:
            state["step"] = torch.zeros((), device=home.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(home), torch.zeros_like(home)
    return state


def set_step(state: dict[str, Any], step: int) -> None:
    """How many steps the optimiser has taken, which AdamW's bias correction depends on."""
    if "step" in state:
        state["step"].fill_(step)
