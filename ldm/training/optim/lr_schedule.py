"""Compute the learning rate as a pure function of the optimiser step: resuming needs no scheduler state."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

LRSchedule = Literal["constant", "cosine", "wsd", "inverse_sqrt"]


@dataclass(frozen=True, kw_only=True)
class LRConfig:
    """Learning rate schedule. wsd: warm-up, stable, linear decay to 0 over the last decay_fraction of steps (1.0: all).

    inverse_sqrt: after warm-up as 1 / sqrt(step), independent of the number of steps: a run can always be extended.
    """

    schedule: LRSchedule = "constant"
    lr: float
    warmup_steps: int = 0
    decay_fraction: float = 0.2  # used only by wsd

    def __post_init__(self) -> None:
        if self.schedule not in get_args(LRSchedule):
            raise ValueError(f"schedule {self.schedule!r} is unknown; choose one of {get_args(LRSchedule)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, not {self.warmup_steps}")
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction must be above 0 and at most 1, not {self.decay_fraction}")


def warmup(step: int, warmup_steps: int) -> float:
    """(step + 1) / warmup_steps, at most 1: no step has a rate of 0."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def linear_decay(step: int, total_steps: int, decay_fraction: float) -> float:
    """1 until the last decay_fraction of the steps, then linear to 0 at total_steps."""
    decay_steps = max(1, round(decay_fraction * total_steps))
    return min(1.0, max(0.0, (total_steps - step) / decay_steps))


def cosine_decay(step: int, total_steps: int, warmup_steps: int) -> float:
    """(1 + cos(pi p)) / 2, p from 0 to 1. Loshchilov & Hutter 2016 (arXiv 1608.03983), eq. 5."""
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return (1 + math.cos(math.pi * min(1.0, max(0.0, progress)))) / 2


def inverse_sqrt_decay(step: int, warmup_steps: int) -> float:
    """sqrt(w / (step + 1)) from step w = warmup_steps on: 1 where warm-up ends. Vaswani et al. 2017 (arXiv 1706.03762),
    eq. 3, divided by its peak."""
    reached = max(1, warmup_steps)
    return math.sqrt(reached / max(step + 1, reached))


def lr_at(config: LRConfig, step: int, total_steps: int) -> float:
    """Compute the learning rate of an optimiser step, counted from 0.

    Decays to 0 reach 0 at total_steps, one after the last step. If warm-up and decay overlap, the lower rate applies.
    """
    decays: dict[LRSchedule, float] = {
        "constant": 1.0,
        "cosine": cosine_decay(step, total_steps, config.warmup_steps),
        "wsd": linear_decay(step, total_steps, config.decay_fraction),
        "inverse_sqrt": inverse_sqrt_decay(step, config.warmup_steps),
    }
    return config.lr * min(warmup(step, config.warmup_steps), decays[config.schedule])
