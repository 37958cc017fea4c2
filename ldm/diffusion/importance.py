"""Training times by importance: more often where the loss is large, and counted less there.

Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.3, with times in bins, so that continuous paths have it too. A time
stands here as the number in [0, 1] that a path's training_times makes it of.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BINS, KEPT = 100, 10  # of [0, 1]; losses that each bin remembers
UNIFORM_SHARE = 0.001  # of the times, drawn evenly, so that no bin is ever forgotten


class LossHistory:
    """The last losses in each bin of times. It is part of a run's state: the same on all ranks, saved and loaded.

    density = sqrt(mean of the bin's squared losses), normalised; even until every bin has seen KEPT losses.
    """

    def __init__(self) -> None:
        self.losses = torch.zeros(BINS, KEPT, dtype=torch.float64)
        self.seen = torch.zeros(BINS, dtype=torch.long)

    @property
    def densities(self) -> Tensor:
        """Of each bin, mean 1, float64."""
        if not (self.seen >= KEPT).all():
            return torch.ones(BINS, dtype=torch.float64)
        size = self.losses.square().mean(1).sqrt()
        return (1 - UNIFORM_SHARE) * size / size.mean() + UNIFORM_SHARE

    def numbers(self, uniforms: Tensor) -> Tensor:
        """Numbers that have this density, rising with the uniform ones: the inverse of its integral."""
        densities = self.densities
        mass = torch.cat([torch.zeros(1, dtype=torch.float64), densities.cumsum(0) / BINS])
        u = uniforms.double() * mass[-1]
        bins = (torch.searchsorted(mass, u, right=True) - 1).clamp(0, BINS - 1)
        return (bins / BINS + (u - mass[bins]) / densities[bins]).float()

    def density(self, numbers: Tensor) -> Tensor:
        return self.densities[bin_of(numbers)].to(numbers)

    def record(self, numbers: Tensor, losses: Tensor) -> None:
        """Remember the losses of a global batch, in its order."""
        for place, loss in zip(bin_of(numbers).tolist(), losses.double().tolist(), strict=True):
            self.losses[place, self.seen[place] % KEPT] = loss
            self.seen[place] += 1

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, which JSON keeps to the last bit."""
        return {"losses": self.losses.tolist(), "seen": self.seen.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.losses.copy_(torch.tensor(state["losses"], dtype=torch.float64))
        self.seen.copy_(torch.tensor(state["seen"]))


def bin_of(numbers: Tensor) -> Tensor:
    return (numbers.double() * BINS).long().clamp(max=BINS - 1)
