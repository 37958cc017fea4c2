"""The rank of this process, and the collective operations in addition to those on gradients and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ranks:
    """Collective operations: every rank must call them, and all ranks get the same result."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, numbers: Sequence[float]) -> list[float]:
        """Sum each number over all ranks, in float64 and one all-reduce."""
        if self.ranks == 1:
            return [float(number) for number in numbers]
        together = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(together)
        return together.tolist()

    def broadcast(self, numbers: Sequence[float]) -> list[float]:
        """Return the main rank's numbers; those of the other ranks are ignored, and may differ in count."""
        count = round(self.all_reduce([len(numbers) if self.is_main else 0])[0])
        return self.all_reduce(list(numbers) if self.is_main else [0.0] * count)

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """Average each tensor's elements over all ranks, in one all-reduce. Tensors empty on all ranks are left out."""
        if not values:
            return {}
        totals = [value.detach().double().sum().item() for value in values.values()]
        counts = [value.numel() for value in values.values()]
        sums = self.all_reduce(totals + counts)
        found = zip(values, sums[: len(values)], sums[len(values) :], strict=True)
        return {name: total / count for name, total, count in found if count > 0}

    def gather(self, rows: Tensor) -> Tensor:
        """Concatenate the rows of all ranks, in order of rank. Every rank has the same number of rows."""
        if self.ranks == 1:
            return rows
        found = [torch.empty_like(rows) for _ in range(self.ranks)]
        dist.all_gather(found, rows.contiguous())
        return torch.cat(found)

    def gather_in_order(self, order: Tensor, rows: Tensor | None) -> Tensor:
        """Concatenate the rows of all ranks, which may differ in number, sorted by `order`, one integer per row.

        rows: N x ..., float32; None: this rank has none. Raises ValueError if no rank has any.
        """
        found: list[Any] = [(order.cpu(), None if rows is None else rows.cpu())]
        if self.ranks > 1:
            found = found * self.ranks
            dist.all_gather_object(found, found[self.rank])
        some = [(own_order, own) for own_order, own in found if own is not None]
        if not some:
            raise ValueError("no rank has any rows to gather")
        orders, gathered = (torch.cat(parts) for parts in zip(*some, strict=True))
        return gathered[orders.argsort()].to(self.device)

    def any_rank(self, wish: bool) -> bool:
        """Return whether the wish is true on any rank, so that all ranks decide alike."""
        return self.all_reduce([wish])[0] > 0

    def gather_flat(
        self, fragment: Tensor | None, start: int, shape: torch.Size, *, everywhere: bool = False
    ) -> Tensor:
        """Gather a tensor of which each rank owns consecutive elements: full on the main rank, undefined elsewhere.

        fragment: this rank's elements, from index `start` of the flattened tensor on, in the dtype of all ranks; None:
        it owns none (float32). everywhere: full on every rank.
        """
        dtype = torch.float32 if fragment is None else fragment.dtype
        flat = torch.zeros(shape.numel(), dtype=dtype, device=self.device)
        if fragment is not None:
            flat[start : start + fragment.numel()] = fragment.to(self.device)
        if self.ranks > 1:  # exact: each element is one rank's number plus zeros
            if everywhere:
                dist.all_reduce(flat)
            else:
                dist.reduce(flat, 0)
        return flat.view(shape)
