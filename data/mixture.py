"""Mix several shard sets within a lane: by weight, exactly, and without any state."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from math import lcm

from data.keyed import permutation


class Mixture:
    """Maps a lane's n-th sample to its set, and to its position among the lane's samples of that set.

    The list of sets is halved until one is left. Of the first n samples that reach a halving, floor(f * n + phase) go
    to the first half, f being its fraction of the weight. So each set's count is always off by less than one per
    halving, and any position is computed directly. The phases are spread evenly over the lanes (by Hermite's identity
    the first halving then divides each global batch exactly); otherwise all lanes would switch to a set at once.
    """

    def __init__(self, weights: Sequence[Fraction], *, lanes: int, seed: int) -> None:
        scale = lcm(*(weight.denominator for weight in weights))
        self._sums = (0, *accumulate(int(weight * scale) for weight in weights))  # exact: floats would drift
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
