"""This process among all that train together, and what they tell each other beside gradients and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class World:
    """Every method is called by all ranks alike, and gives all of them the same."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """The sum of each number over all ranks, in float64 and one message."""
        if self.ranks == 1:
            return [float(number) for number in numbers]
        together = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(together)
        return together.tolist()

    def from_main(self, numbers: Sequence[float]) -> list[float]:
        """The main rank's numbers, however many; what the others give is not looked at."""
        count = round(self.sums([len(numbers) if self.is_main else 0])[0])
        return self.sums(list(numbers) if self.is_main else [0.0] * count)

    def means(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean of each tensor's elements over all ranks, in one message. What is empty everywhere is left out."""
        if not values:
            return {}
        totals = [value.detach().double().sum().item() for value in values.values()]
        counts = [value.numel() for value in values.values()]
        told = self.sums(totals + counts)
        found = zip(values, told[: len(values)], told[len(values) :], strict=True)
        return {name: total / count for name, total, count in found if count > 0}

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, as many of each, one rank's after another's."""
        if self.ranks == 1:
            return rows
        found = [torch.empty_like(rows) for _ in range(self.ranks)]
        dist.all_gather(found, rows.contiguous())
        return torch.cat(found)

    def total(self, count: int) -> int:
        """The sum of one number over all ranks."""
        return round(self.sums([count])[0])

    def agree(self, wish: bool) -> bool:
        """Whether any rank wishes so, so that none goes on alone."""
        return self.sums([wish])[0] > 0

    def whole(self, fragment: Tensor | None, start: int, shape: torch.Size, *, everywhere: bool = False) -> Tensor:
        """A tensor of which each rank owns a run of consecutive elements: whole on the main rank, undefined elsewhere.

        fragment: this rank's elements, of the dtype that all have, from number `start` of the flattened tensor on;
        None: it owns none, of a float32 tensor. everywhere: whole on every rank.
        """
        dtype = torch.float32 if fragment is None else fragment.dtype
        flat = torch.zeros(shape.numel(), dtype=dtype, device=self.device)
        if fragment is not None:
            flat[start : start + fragment.numel()] = fragment.to(self.device)
        if self.ranks > 1:  # every element is some rank's number plus zeros: exact
            if everywhere:
                dist.all_reduce(flat)
            else:
                dist.reduce(flat, 0)
        return flat.view(shape)
