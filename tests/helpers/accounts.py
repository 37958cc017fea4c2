"""Accounts of what a stream delivers: each sample of each epoch of a shard is delivered, or another in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data.loader import Batch, CaptionedImages
from data.order import Visit


@dataclass(slots=True)
class Account:
    """The visits to one shard in one epoch: `before` + `delivered` + `rejected` of the `expected` samples so far."""

    shard: int
    epoch: int
    expected: int
    before: int  # visited before this process began
    delivered: int = 0
    rejected: int = 0

    @property
    def is_closed(self) -> bool:
        return self.before + self.delivered + self.rejected == self.expected


class Ledger:
    """The accounts of all shards, derived from the visits, so that resuming a run needs no stored state.

    A visit delivers its sample, or rejects it if another is used instead. `open` holds the shards being read, by
    (epoch, shard); `closed` those that were read to the end; the totals are of this process.
    """

    def __init__(self, shard_sizes: Sequence[int]) -> None:
        self.shard_sizes = shard_sizes
        self.open: dict[tuple[int, int], Account] = {}
        self.closed: list[Account] = []
        self.delivered = self.rejected = 0

    def record(self, visits: Sequence[Visit], samples: Sequence[tuple[int, int]]) -> None:
        """Record visits. samples: (shard, index) of the sample that each visit got, in the same order."""
        for visit, sample in zip(visits, samples, strict=True):
            place = (visit.epoch, visit.shard)
            account = self.open.get(place)
            if account is None:
                account = Account(visit.shard, visit.epoch, self.shard_sizes[visit.shard], visit.before)
                self.open[place] = account
            if sample == (visit.shard, visit.index):
                account.delivered += 1
                self.delivered += 1
            else:
                account.rejected += 1
                self.rejected += 1
            if account.is_closed:
                self.closed.append(self.open.pop(place))


def accounts_of(images: CaptionedImages, batches: Sequence[Batch]) -> Ledger:
    """The accounts of a stream's batches, from batch 0 on."""
    ledger = Ledger(images.store.sizes)
    for number, batch in enumerate(batches):
        ledger.record(images.order.batch(number, rank=images.rank, ranks=images.ranks), batch.samples)
    return ledger
