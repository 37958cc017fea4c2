"""Importance sampling of training times: more often where the loss is large, with a lower weight there.

Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.3, with times in bins, so that it works for continuous paths. Here
a time is the number in [0, 1] from which a path's training_times computes it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.nodes import floats

BINS, KEPT = 100, 10  # bins of [0, 1]; losses stored per bin
UNIFORM_FRACTION = 0.001  # of the times are drawn uniformly, so that every bin is visited


class LossHistory:
    """The last losses in each bin of times. Part of a run's state: equal on all ranks, saved and loaded.

    density = sqrt(mean of the bin's squared losses), normalised; uniform until every bin has KEPT losses.
    """

    def __init__(self) -> None:
        self.losses = torch.zeros(BINS, KEPT, dtype=torch.float64)
        self.seen = torch.zeros(BINS, dtype=torch.long)

    @property
    def densities(self) -> Tensor:
        """The density of each bin, with mean 1, float64."""
        if not (self.seen >= KEPT).all():
            return torch.ones(BINS, dtype=torch.float64)
        size = self.losses.square().mean(1).sqrt()
        return (1 - UNIFORM_FRACTION) * size / size.mean() + UNIFORM_FRACTION

    def numbers(self, uniforms: Tensor) -> Tensor:
        """Map uniform numbers monotonically to this density, by inverting its integral."""
        densities = self.densities
        mass = torch.cat([torch.zeros(1, dtype=torch.float64), densities.cumsum(0) / BINS])
        u = uniforms.double() * mass[-1]
        bins = (torch.searchsorted(mass, u, right=True) - 1).clamp(0, BINS - 1)
        return (bins / BINS + (u - mass[bins]) / densities[bins]).float()

    def density(self, numbers: Tensor) -> Tensor:
        return self.densities[bin_of(numbers)].to(numbers)

    def record(self, numbers: Tensor, losses: Tensor) -> None:
        """Store the losses of a global batch, in its order."""
        for place, loss in zip(bin_of(numbers), floats(losses.double()), strict=True):
            self.losses[place, self.seen[place] % KEPT] = loss
            self.seen[place] += 1

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers, which JSON stores exactly."""
        return {"losses": [floats(row) for row in self.losses], "seen": [int(count) for count in self.seen]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.copy_(torch.tensor(state["losses"], dtype=torch.float64))
        self.seen.copy_(torch.tensor(state["seen"]))


def bin_of(numbers: Tensor) -> Tensor:
    return (numbers.double() * BINS).long().clamp(max=BINS - 1)
