"""Loss scaling for float16, whose small gradients would underflow. Micikevicius et al. 2017 (arXiv 1710.03740)."""

from typing import NamedTuple

START, LARGEST = 2.0**16, 2.0**24
PATIENCE = 2000  # steps without overflow before the scale is doubled


class LossScale(NamedTuple):
    """The current loss scale. Immutable: each step returns the next one."""

    scale: float = START
    good_steps: int = 0  # since the last change

    def after(self, *, overflowed: bool) -> "LossScale":
        """Halve the scale after a gradient that is not finite, double it after PATIENCE finite ones."""
        if overflowed:
            return LossScale(max(self.scale / 2, 1.0), 0)
        if self.good_steps + 1 >= PATIENCE:
            return LossScale(min(self.scale * 2, LARGEST), 0)
        return LossScale(self.scale, self.good_steps + 1)
