"""Define the order of samples as a pure function of the configuration, so that one integer resumes it.

Shards are permuted by (seed, epoch) and dealt to a fixed number of *lanes*. A lane is an endless, deterministic
stream of samples. Every global batch takes the same number of samples from each lane, and each rank an equal,
consecutive part of the batch. So the content of global batch b does not depend on the number of ranks or workers, or on
where the run was stopped. If there are more lanes than shards, each shard is split into *parts*, by sample, which are
permuted and dealt in place of the shards; empty shards are left out. With several shard sets, each set has its own
streams, which a lane mixes by `Mixture`. All random draws are computed from keys, not from a generator whose state
could be lost. WebDataset's own shuffling is not used, because it repeats one shard order every epoch and loses its
buffer when a run stops.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from hashlib import blake2b
from math import lcm

MOST_LANES = 32  # by default


def keyed_hash(*key: object) -> int:
    """Hash a key to a 64-bit number that is the same on any machine, library version and process."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big")


@lru_cache(maxsize=2048)  # at least one per lane and set; at 10,000 samples each, they take 80 MB
def permutation(size: int, *key: object) -> Sequence[int]:
    """Permute range(size) by sorting keyed hashes: stable across versions of every library."""
    return array("I", sorted(range(size), key=lambda index: keyed_hash(*key, index)))


def default_lanes(batch_size: int, shards: int) -> int:
    """Return the largest divisor of the global batch size up to 32 for which there are enough shards.

    shards: of the smallest set. The number of ranks has no part in it: it may change when a run is resumed.
    """
    most = max(min(MOST_LANES, shards), 1)
    return max(lanes for lanes in range(1, most + 1) if batch_size % lanes == 0)


@dataclass(frozen=True, slots=True)
class Visit:
    """One visit to one sample: its place in the shards, and in the global order of the run."""

    position: int  # in the global order: batch * global_batch + place in the batch
    epoch: int  # of the visiting lane, in the shard's set
    shard: int  # counted over all sets
    index: int  # of the sample in its shard's own (unshuffled) order
    lane: int
    before: int  # samples of the shard (or of its part that the lane reads) visited earlier in this epoch


@dataclass(frozen=True, slots=True)
class SetSpan:
    """A shard set for SampleOrder: its weight, and its number of consecutive shards."""

    name: str
    weight: Fraction
    shards: int


class SampleOrder:
    """Computes which samples global batch b contains, from the shards' sizes alone.

    sets: the shards and the weight of each set; empty: all shards are one set.
    Raises ValueError if a set has fewer samples than there are lanes (some lanes would be empty), or if the batch size
    is not a multiple of the lanes.
    """

    def __init__(
        self, shard_sizes: Sequence[int], *, batch_size: int, lanes: int, seed: int, sets: Sequence[SetSpan] = ()
    ) -> None:
        if lanes >= 1 and batch_size % lanes:
            raise ValueError(
                f"data.batch_size is {batch_size}, expected a multiple of data.lanes ({lanes}): give another, or leave "
                "data.lanes out"
            )
        self.shard_sizes = tuple(shard_sizes)
        self.batch_size, self.lanes, self.seed = batch_size, lanes, seed
        self.per_lane = batch_size // max(lanes, 1)
        self._sets: list[SetOrder] = []
        first = 0
        for span in sets:
            own = self.shard_sizes[first : first + span.shards]
            self._sets.append(SetOrder(own, lanes=lanes, seed=seed, first=first, name=span.name))
            first += span.shards
        self._sets = self._sets or [SetOrder(self.shard_sizes, lanes=lanes, seed=seed)]
        self._mixture = Mixture([span.weight for span in sets] or [Fraction(1)], lanes=lanes, seed=seed)

    def batch(self, number: int, *, rank: int = 0, ranks: int = 1) -> list[Visit]:
        """List this rank's visits of global batch `number`, ordered by position."""
        if self.batch_size % ranks:
            fitting = lcm(self.lanes, ranks)
            raise ValueError(
                f"data.batch_size is {self.batch_size}, expected a multiple of the {ranks} ranks: give "
                f"data.batch_size={-(-self.batch_size // fitting) * fitting}"
            )
        own = self.batch_size // ranks
        return [
            self._visit(lane, number * self.per_lane + place, number * self.batch_size + lane * self.per_lane + place)
            for lane, place in (divmod(row, self.per_lane) for row in range(rank * own, (rank + 1) * own))
        ]

    def shards_from(self, visit: Visit) -> Iterator[int]:
        """Yield, endlessly, the shards that the visit's lane reads in its set, beginning with the visited one."""
        own = next(own for own in self._sets if visit.shard < own.first + own.shards)
        return own.shards_from(visit)

    def _visit(self, lane: int, lane_position: int, position: int) -> Visit:
        which, set_position = self._mixture.place(lane, lane_position)
        return self._sets[which].visit(lane, set_position, position)


class SetOrder:
    """The lanes' streams through one shard set. first: the number of its first shard among all."""

    def __init__(self, sizes: Sequence[int], *, lanes: int, seed: int, first: int = 0, name: str | None = None) -> None:
        of = "" if name is None else f" in set {name}"
        if not any(sizes):
            raise ValueError(f"there are no samples{of}: give shards that hold some")
        if not 1 <= lanes <= sum(sizes):
            raise ValueError(
                f"data.lanes is {lanes} but there are {sum(sizes)} samples{of}: leave data.lanes out, or give 1 to "
                f"{sum(sizes)}"
            )
        self.shards, self.lanes, self.first = len(sizes), lanes, first
        # The fewest parts per shard of which no lane is without one: 1 if there are as many shards as lanes.
        self.per_shard = next(parts for parts in itertools.count(1) if sum(min(size, parts) for size in sizes) >= lanes)
        self._parts = [(shard, part) for shard, size in enumerate(sizes) for part in range(min(size, self.per_shard))]
        self._numbers = {part: number for number, part in enumerate(self._parts)}
        self.sizes = tuple(len(range(part, sizes[shard], self.per_shard)) for shard, part in self._parts)
        # A set's random draws do not depend on other sets, so adding a set does not change them.
        self._key = (seed,) if name is None else (seed, name)
        self._epoch_starts = [[0] for _ in range(lanes)]  # per lane: its position at which each epoch begins
        self._tables: dict[int, tuple[int, Sequence[int], list[int]]] = {}
        self._growing = threading.Lock()  # several threads request batches at once

    def visit(self, lane: int, set_position: int, position: int) -> Visit:
        """Locate a lane's sample `set_position` of this set. position: of the visit in the run's global order."""
        epoch = self._epoch_at(lane, set_position)
        offset = set_position - self._epoch_starts[lane][epoch]
        numbers, ends = self._table(lane, epoch)
        which = bisect.bisect_right(ends, offset)
        number = numbers[which]
        before = offset - (ends[which] - self.sizes[number])
        order = permutation(self.sizes[number], "samples", *self._key, epoch, number)
        shard, part = self._parts[number]
        return Visit(position, epoch, self.first + shard, part + order[before] * self.per_shard, lane, before)

    def shards_from(self, visit: Visit) -> Iterator[int]:
        visited = self._numbers[visit.shard - self.first, visit.index % self.per_shard]
        own = self._lane_parts(visit.lane, visit.epoch)
        yield from (self._shard(number) for number in own[own.index(visited) :])
        for epoch in itertools.count(visit.epoch + 1):
            yield from (self._shard(number) for number in self._lane_parts(visit.lane, epoch))

    def _shard(self, number: int) -> int:
        return self.first + self._parts[number][0]

    def _table(self, lane: int, epoch: int) -> tuple[Sequence[int], list[int]]:
        """Return the lane's parts in an epoch and the offset at which each one ends; the last table is cached."""
        kept = self._tables.get(lane)
        if kept is None or kept[0] != epoch:
            parts = self._lane_parts(lane, epoch)
            kept = self._tables[lane] = (epoch, parts, list(itertools.accumulate(self.sizes[one] for one in parts)))
        return kept[1], kept[2]

    def _lane_parts(self, lane: int, epoch: int) -> Sequence[int]:
        return permutation(len(self.sizes), "shards", *self._key, epoch)[lane :: self.lanes]

    def _epoch_at(self, lane: int, set_position: int) -> int:
        """Find the epoch of a lane's position. Epochs differ in length, because shards do."""
        starts = self._epoch_starts[lane]
        with self._growing:
            while starts[-1] <= set_position:
                starts.append(starts[-1] + self._length(self._lane_parts(lane, len(starts) - 1)))
        return bisect.bisect_right(starts, set_position) - 1

    def _length(self, parts: Iterable[int]) -> int:
        return sum(self.sizes[part] for part in parts)


class Mixture:
    """Mixes several shard sets within a lane: by weight, exactly, and without any state.

    Maps a lane's n-th sample to its set, and to its position among the lane's samples of that set.

    The list of sets is halved until one is left. Of the first n samples that reach a halving, floor(f * n + phase) go
    to the first half, f being its fraction of the weight. So each set's count is always off by less than one per
    halving, and any position is computed directly. The phases are spread evenly over the lanes (by Hermite's identity
    the first halving then divides each global batch exactly); otherwise all lanes would switch to a set at once.
    """

    def __init__(self, weights: Sequence[Fraction], *, lanes: int, seed: int) -> None:
        scale = lcm(*(weight.denominator for weight in weights))
        self._sums = (0, *itertools.accumulate(int(weight * scale) for weight in weights))  # exact: floats would drift
        self.lanes, self.seed = lanes, seed

    def place(self, lane: int, position: int) -> tuple[int, int]:
        """Return the set of a lane's sample `position`, and its position among the lane's samples of that set."""
        low, high = 0, len(self._sums) - 1
        while high - low > 1:
            middle = (low + high) // 2
            first = self._first(low, middle, high, lane, position)
            if self._first(low, middle, high, lane, position + 1) > first:
                high, position = middle, first
            else:
                low, position = middle, position - first
        return low, position

    def _first(self, low: int, middle: int, high: int, lane: int, count: int) -> int:
        """Count how many of the first `count` samples of sets low to high go to the sets below middle."""
        part, total = self._sums[middle] - self._sums[low], self._sums[high] - self._sums[low]
        phase = permutation(self.lanes, "mixture", self.seed, low, high)[lane]  # divided by `lanes`: in [0, 1)
        return (part * self.lanes * count + phase * total) // (total * self.lanes)
