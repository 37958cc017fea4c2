"""How a lane mixes several sets of shards: by weight, exactly, and without remembering anything."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from math import lcm

from data.keyed import permutation


class Mixture:
    """Which set a lane's n-th sample belongs to, and how many of that set the lane has had before it.

    Sets are halved until one is left. Of the first n samples that reach a halving, floor(share * n + phase) go to the
    first half: so every set's count, after any number of samples, is off its share by less than one a halving, and any
    position is computed without walking there. The phases are spread evenly over the lanes (by Hermite's identity the
    first halving then divides each global batch exactly); otherwise all lanes would turn to a set at once.
    """

    def __init__(self, weights: Sequence[Fraction], *, lanes: int, seed: int) -> None:
        whole = lcm(*(weight.denominator for weight in weights))
        self._sums = (0, *accumulate(int(weight * whole) for weight in weights))  # exact: floats would drift
        self.lanes, self.seed = lanes, seed

    def place(self, lane: int, position: int) -> tuple[int, int]:
        """Of a lane's sample `position`: its set, and its position among the lane's samples of that set."""
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
        """How many of the first `count` samples of sets low to high go to those below middle."""
        part, whole = self._sums[middle] - self._sums[low], self._sums[high] - self._sums[low]
        phase = permutation(self.lanes, "mixture", self.seed, low, high)[lane]  # of `lanes`: from 0 to below 1
        return (part * self.lanes * count + phase * whole) // (whole * self.lanes)
