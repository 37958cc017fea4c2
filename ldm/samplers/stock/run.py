"""One drawing with a scheduler of diffusers': its nodes, and what all its methods have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.diffusion.nodes import Node
from ldm.diffusion.predictions import Prediction
from ldm.samplers.steps import Denoise, Generators
from ldm.samplers.stock.grids import StockGrid, StockTable
from ldm.samplers.stock.path import StockPath, parts_of
from ldm.samplers.stock.scheduler import StockScheduler

CLEAN = Node(torch.zeros((), dtype=torch.float64), 1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class StockRun:
    """What a scheduler needs to draw: its values, its grid, and the table of levels it was trained on."""

    scheduler: StockScheduler
    prediction: Prediction
    path: StockPath
    table: StockTable
    grid: StockGrid
    steps: int  # as requested; a rounding of numpy's can make the grid longer
    begin: int = 0  # the first entry of the list of evaluations that is taken, above 0 from an initial image

    @property
    def entries(self) -> int:
        return len(self.table.alphas)

    def entry(self, index: int) -> tuple[float, float]:
        return self.table.alphas[index], self.table.sigmas[index]

    def node(self, timestep: float) -> Node:
        """Return the table's node of a whole timestep. Raises ValueError beyond its end."""
        if not 0 <= timestep < self.entries:
            raise ValueError(
                f"{self.scheduler.kind} with {self.steps} steps evaluates at timestep {timestep:g} of "
                f"{self.entries}: use fewer steps"
            )
        return self.path.add(timestep, *self.entry(int(timestep)), timestep)

    def level(self, timestep: float) -> Node:
        """Return the level of a timestep, or below all of them the one at which sampling ends."""
        if timestep >= 0:
            return self.node(timestep)
        if self.scheduler.get("set_alpha_to_one", True):
            return CLEAN
        return Node(CLEAN.t, *self.entry(0))

    def level_node(self, index: int) -> Node:
        """Return the node of the grid's level `index`; the last level is only a place to step to."""
        if index >= len(self.grid.timesteps):
            return Node(CLEAN.t, *parts_of(self.grid.kappas[index]))
        timestep = self.grid.timesteps[index]
        return self.path.add_level(timestep, self.grid.kappas[index], timestep)

    def limited(self, x0: Tensor) -> Tensor:
        """Clip x0_hat, or threshold it dynamically, as the scheduler states. Saharia et al. 2022 (arXiv 2205.11487)."""
        scheduler = self.scheduler
        if scheduler.get("thresholding"):
            ratio, most = float(scheduler["dynamic_thresholding_ratio"]), float(scheduler["sample_max_value"])
            limits = torch.quantile(x0.flatten(1).abs(), ratio, dim=1).clamp(1, most).view(-1, *[1] * (x0.ndim - 1))
            return x0.clamp(-limits, limits) / limits
        if scheduler.get("clip_sample"):
            largest = float(scheduler["clip_sample_range"])
            return x0.clamp(-largest, largest)
        return x0

    def output(self, x0: Tensor, x: Tensor, node: Node) -> Tensor:
        """Return the network's output, eps or v, of an x0_hat at a node."""
        eps = eps_of(x0, x, node)
        return node.alpha * eps - node.sigma * x0 if self.prediction == "v" else eps


Method = Callable[[StockRun, Denoise, Tensor, Generators], Tensor]


def eps_of(x0: Tensor, x: Tensor, node: Node) -> Tensor:
    return (x - node.alpha * x0) / node.sigma
