"""Estimate how long a run still takes: its steps, and what it does between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic

INTERVALS = 10  # of the last progress lines, whose speed counts: a busy minute should not change all


class TimeLeft:
    """Measures steps and the work between them. every: steps from one to the next, by the name of the work; the last
    step of a run is followed by each."""

    def __init__(self, steps: int, every: Mapping[str, int]) -> None:
        self.steps, self.every = steps, dict(every)
        self._speed: deque[tuple[int, float]] = deque(maxlen=INTERVALS)  # steps and their seconds
        self._work: dict[str, tuple[int, float]] = {}  # how often, and how long in all, in this session

    def add_steps(self, count: int, seconds: float) -> None:
        self._speed.append((count, seconds))

    @contextmanager
    def working(self, name: str) -> Iterator[None]:
        """Context manager: measure one piece of the work between the steps."""
        started = monotonic()
        yield
        count, seconds = self._work.get(name, (0, 0.0))
        self._work[name] = (count + 1, seconds + monotonic() - started)

    def of_work(self, name: str) -> float | None:
        """Return the mean seconds of this work; None if there was none in this session."""
        count, seconds = self._work.get(name, (0, 0.0))
        return seconds / count if count else None

    def seconds(self, step: int) -> float:
        """Return the seconds left after this step, before the work that is due at it."""
        count, spent = (sum(column) for column in zip(*self._speed, strict=True))
        left = (self.steps - step) * spent / max(count, 1)
        return left + sum(self.due(name, step) * (self.of_work(name) or 0.0) for name in self.every)

    def due(self, name: str, step: int) -> int:
        """Return how often this work comes from this step on, to the end."""
        every = self.every[name]
        return self.steps // every - (step - 1) // every + (self.steps % every > 0)
