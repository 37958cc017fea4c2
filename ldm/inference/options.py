"""How a picture is drawn, beyond what everybody sets. Torch is not needed here: --help must not wait for it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ldm.files.messages import unknown_name

WEIGHTINGS = ("none", "a1111")  # of words in a prompt
FORMATS = ("diffusers", "single-file")  # of what is exported
SCHEDULES = ("constant", "linear", "cosine")  # of guidance's scale over time
MAX_LORA_STRENGTH = 100


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """The defaults are a sampler as it is, and plain classifier-free guidance.

    Raises ValueError, naming the value, for anything out of range. What depends on the model is checked with it.
    """

    eta: float | None = None  # share of DDPM's noise, 0 to 1, of samplers that have one; None: the sampler's own
    time_grid: str | None = None  # a name of TIME_GRIDS, or times as "1, 0.6, 0.3, 0"; None: the path's own
    guidance_schedule: str = "constant"  # of SCHEDULES
    guidance_interval: tuple[float, float] = (0.0, 1.0)  # times at which guidance is on, counted from data to noise
    guidance_rescale: float = 0.0  # share by which the answer's deviation is brought back, 0 to 1
    guidance_parallel: float = 1.0  # share that is kept of guidance's change along the answer; 0: projected guidance
    guidance_norm_limit: float | None = None  # the longest such change of a picture; None: none
    guidance_momentum: float = 0.0  # share of the last step's change that is added, usually negative
    weighting: str = "none"  # of WEIGHTINGS: whether brackets in a prompt weigh words, and long ones become chunks

    def __post_init__(self) -> None:
        for name in ("eta", "guidance_rescale", "guidance_parallel"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name.replace('_', ' ')} is {value}, expected 0 to 1")
        if self.guidance_schedule not in SCHEDULES:
            raise unknown_name("guidance schedule", self.guidance_schedule, {name: name for name in SCHEDULES})
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"no weighting {self.weighting!r}, expected {' or '.join(WEIGHTINGS)}")
        start, stop = self.guidance_interval
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"the guidance interval is {start:g} to {stop:g}, expected 0 <= start <= stop <= 1")
        if self.guidance_norm_limit is not None and not 0 < self.guidance_norm_limit < math.inf:
            raise ValueError(f"guidance norm limit is {self.guidance_norm_limit}, expected a length above 0")
        if not -1 < self.guidance_momentum < 1:
            raise ValueError(f"guidance momentum is {self.guidance_momentum}, expected more than -1 and less than 1")
        if self.is_projected and self.guidance_rescale:
            raise ValueError(
                "guidance rescale and projected guidance (parallel, norm limit, momentum) are two cures of one thing: "
                "use one of them"
            )
        if self.times is not None:
            check_falling(self.times)

    @property
    def is_projected(self) -> bool:
        return self.guidance_parallel != 1 or self.guidance_norm_limit is not None or self.guidance_momentum != 0

    @property
    def times(self) -> tuple[float, ...] | None:
        """time_grid's times, if it is not a name. Raises ValueError if they are no numbers."""
        if self.time_grid is None or "," not in self.time_grid:
            return None
        try:
            return tuple(float(word) for word in self.time_grid.split(","))
        except ValueError:
            raise ValueError(f"the time grid is {self.time_grid!r}, expected numbers, as in 1, 0.6, 0.3, 0") from None

    @property
    def grid(self) -> str | tuple[float, ...] | None:
        """What ldm.samplers.time_grid takes."""
        return self.times or self.time_grid


PLAIN = DrawOptions()


def check_falling(times: tuple[float, ...]) -> None:
    """Raise ValueError unless the times fall strictly from at most 1 to 0."""
    falling = all(later < earlier for earlier, later in pairwise(times))
    if len(times) < 2 or not falling or not times[0] <= 1 or times[-1] != 0 or not all(map(math.isfinite, times)):
        shown = ", ".join(f"{t:g}" for t in times)
        raise ValueError(f"the time grid is {shown}, expected two or more times that fall from at most 1 to 0")


def parse_lora_argument(text: str) -> tuple[Path, float]:
    """PATH or PATH:X -> a LoRA's file and its strength, 1 if none is given. A colon before no number is of the path.

    Raises ValueError for no path, or a strength out of range.
    """
    path, _, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        path, strength = text, 1.0
    if not path or path.isspace():
        raise ValueError(
            f"the LoRA is {text!r}, expected a file, or a file with its strength, as in style.safetensors:0.8"
        )
    if not abs(strength) <= MAX_LORA_STRENGTH:
        raise ValueError(
            f"the strength of LoRA {path} is {number}, expected -{MAX_LORA_STRENGTH} to {MAX_LORA_STRENGTH}"
        )
    return Path(path), strength
