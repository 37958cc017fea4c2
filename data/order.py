"""The order of samples: a pure function of the configuration, so that it can be resumed from one integer.

Shards are permuted by (seed, epoch) and dealt to a fixed number of *lanes*. A lane is an endless, deterministic
stream of samples. Every global batch takes the same number of samples from each lane, and a rank owns whole lanes.
So the content of global batch b depends on neither the number of ranks, nor the number of workers, nor on where
the run was stopped. WebDataset's own shuffling is not used because it repeats one shard order every epoch and
loses its buffer when a run stops.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b


def keyed_hash(*key: object) -> int:
    """A 64-bit number that depends on the key alone: on no machine, library version or process."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big")


@lru_cache(maxsize=256)
def permutation(size: int, *key: object) -> tuple[int, ...]:
    """A permutation of range(size), drawn by sorting keyed hashes: stable across versions of every library."""
    return tuple(sorted(range(size), key=lambda index: keyed_hash(*key, index)))


@dataclass(frozen=True, slots=True)
class Visit:
    """One visit to one sample: where it stands in the shards, and in the global order of the run."""

    position: int  # in the global order: batch * global_batch + place in the batch
    epoch: int  # of the lane that visits it
    shard: int
    index: int  # of the sample in its shard's own (unshuffled) order


class SampleOrder:
    """Which samples global batch b holds, from the shards' sizes alone.

    Raises ValueError where the lanes cannot be dealt: fewer shards than lanes (some lanes would be empty), or a
    batch that is no multiple of the lanes.
    """

    def __init__(self, shard_sizes: Sequence[int], *, batch_size: int, lanes: int, seed: int) -> None:
        if not 1 <= lanes <= len(shard_sizes):
            raise ValueError(
                f"data.lanes is {lanes} but there are {len(shard_sizes)} shards: need 1 <= lanes <= shards"
            )
        if batch_size % lanes:
            raise ValueError(f"the batch of {batch_size} is not a multiple of data.lanes ({lanes}): change either")
        if min(shard_sizes) < 1:
            raise ValueError("a shard is empty: remove it from the list of shards")
        self.shard_sizes = tuple(shard_sizes)
        self.batch_size, self.lanes, self.seed = batch_size, lanes, seed
        self.per_lane = batch_size // lanes
        self._epoch_starts = [[0] for _ in range(lanes)]  # per lane: its position at which each epoch begins
        self._growing = threading.Lock()  # batches are asked for by several threads at once

    def batch(self, number: int, *, rank: int = 0, ranks: int = 1) -> list[Visit]:
        """This rank's share of global batch `number`, ordered by position."""
        if self.lanes % ranks:
            raise ValueError(f"data.lanes ({self.lanes}) is not a multiple of the {ranks} ranks: choose one that is")
        own = self.lanes // ranks
        return [
            self._visit(lane, number * self.per_lane + place, number * self.batch_size + lane * self.per_lane + place)
            for lane in range(rank * own, (rank + 1) * own)
            for place in range(self.per_lane)
        ]

    def _visit(self, lane: int, lane_position: int, position: int) -> Visit:
        epoch = self._epoch_at(lane, lane_position)
        offset = lane_position - self._epoch_starts[lane][epoch]
        for shard in self._lane_shards(lane, epoch):
            if offset < self.shard_sizes[shard]:
                order = permutation(self.shard_sizes[shard], "samples", self.seed, epoch, shard)
                return Visit(position, epoch, shard, order[offset])
            offset -= self.shard_sizes[shard]
        raise AssertionError("an epoch of a lane is shorter than its own length")

    def _lane_shards(self, lane: int, epoch: int) -> tuple[int, ...]:
        return permutation(len(self.shard_sizes), "shards", self.seed, epoch)[lane :: self.lanes]

    def _epoch_at(self, lane: int, lane_position: int) -> int:
        """The epoch in which a lane's position falls; its epochs differ in length, since shards do."""
        starts = self._epoch_starts[lane]
        with self._growing:
            while starts[-1] <= lane_position:
                starts.append(starts[-1] + self._length(self._lane_shards(lane, len(starts) - 1)))
        return bisect.bisect_right(starts, lane_position) - 1

    def _length(self, shards: Iterable[int]) -> int:
        return sum(self.shard_sizes[shard] for shard in shards)
