"""Loss scaling for float16, whose small gradients would round to zero. Micikevicius et al. 2017 (arXiv 1710.03740)."""

from dataclasses import asdict, dataclass
from typing import Any

START, LARGEST = 2.0**16, 2.0**24
PATIENCE = 2000  # steps without overflow after which twice the scale is tried


@dataclass(frozen=True, slots=True)
class LossScale:
    """Immutable: each step gives the next one."""

    scale: float = START
    good_steps: int = 0  # since it last changed

    def after(self, *, overflowed: bool) -> "LossScale":
        """Half as much after a gradient that was not finite, twice as much after PATIENCE that were."""
        if overflowed:
            return LossScale(max(self.scale / 2, 1.0), 0)
        if self.good_steps + 1 >= PATIENCE:
            return LossScale(min(self.scale * 2, LARGEST), 0)
        return LossScale(self.scale, self.good_steps + 1)

    def record(self) -> dict[str, Any]:
        return asdict(self)
