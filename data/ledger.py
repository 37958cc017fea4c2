"""Whether all samples are accounted for, and whether too many of them are bad."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from data.order import Visit

WINDOW = 10_000  # visits
FEWEST_VISITS = 100  # before anything is said of shares
FEWEST_BAD = 10  # different samples: one bad one in a small set is no trouble of the whole


@dataclass(slots=True)
class Account:
    """One shard in one epoch: `before` + `delivered` + `rejected` samples of the `expected` have been visited."""

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
    """Accounts of all shards, kept from the visits: so they need no state of their own when a run is resumed.

    A visit delivers its sample, or rejects it where another had to stand in. `open` are the shards being read, by
    (epoch, shard); `closed` those read to their end, the last 10,000 of them; totals are of this process.
    """

    def __init__(self, shard_sizes: Sequence[int]) -> None:
        self.shard_sizes = shard_sizes
        self.open: dict[tuple[int, int], Account] = {}
        self.closed: deque[Account] = deque(maxlen=10_000)
        self.delivered = self.rejected = 0

    def record(self, visits: Sequence[Visit], samples: Sequence[tuple[int, int]]) -> None:
        """samples: (shard, index) of what each visit, in the order's own order, was given."""
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


class BadShare:
    """The share of different bad samples among the different samples of the last 10,000 visits."""

    def __init__(self) -> None:
        self._visits: deque[tuple[tuple[int, int], bool]] = deque()
        self._seen: Counter[tuple[int, int]] = Counter()
        self._bad: Counter[tuple[int, int]] = Counter()

    def record(self, sample: tuple[int, int], *, is_bad: bool) -> None:
        self._visits.append((sample, is_bad))
        self._seen[sample] += 1
        if is_bad:
            self._bad[sample] += 1
        if len(self._visits) > WINDOW:
            oldest, was_bad = self._visits.popleft()
            for counts in (self._seen, self._bad) if was_bad else (self._seen,):
                counts[oldest] -= 1
                if not counts[oldest]:
                    del counts[oldest]

    def above(self, most: float) -> tuple[int, int] | None:
        """How many of how many are bad, if that is more than the share `most` and enough to judge by."""
        bad, seen = len(self._bad), len(self._seen)
        enough = len(self._visits) >= FEWEST_VISITS and bad >= FEWEST_BAD
        return (bad, seen) if enough and bad > most * seen else None
