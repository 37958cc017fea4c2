"""The time that a run still takes."""

from __future__ import annotations

import pytest

from ldm.training.time_left import INTERVALS, TimeLeft


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("ldm.training.time_left.monotonic", lambda: self.now)


@pytest.mark.parametrize(
    ("steps", "every", "step", "due"),
    [
        (100, 10, 1, 10),
        (100, 10, 10, 10),  # that of step 10 is still to come
        (100, 10, 11, 9),
        (100, 10, 100, 1),
        (95, 10, 91, 1),  # after the last step, though it is no multiple
        (95, 10, 90, 2),
        (5, 1000, 1, 1),
    ],
)
def test_how_often_work_is_still_due(steps: int, every: int, step: int, due: int):
    assert TimeLeft(steps, {"draw": every}).due("draw", step) == due
    at = {n for n in range(step, steps + 1) if n % every == 0 or n == steps}
    assert len(at) == due


def test_drawing_and_saving_count_as_long_as_they_took(monkeypatch: pytest.MonkeyPatch):
    clock, left = Clock(monkeypatch), TimeLeft(100, {"draw": 50, "save": 20})
    left.add_steps(10, 5.0)
    assert left.seconds(10) == 45.0 and left.of_work("draw") is None
    for name, seconds in (("draw", 30.0), ("save", 1.0), ("draw", 10.0)):
        with left.working(name):
            clock.now += seconds
    assert left.of_work("draw") == 20.0
    assert left.seconds(10) == 45.0 + 2 * 20.0 + 5 * 1.0
    assert left.seconds(100) == 20.0 + 1.0  # "ETA 0:00:00" was said before the last sheet


def test_one_slow_interval_does_not_change_all():
    left = TimeLeft(1000, {})
    for _ in range(INTERVALS - 1):
        left.add_steps(10, 10.0)
    assert left.seconds(100) == 900.0
    left.add_steps(10, 60.0)
    assert left.seconds(100) == pytest.approx(900.0 * 1.5)  # not six times
    for _ in range(INTERVALS):
        left.add_steps(10, 20.0)
    assert left.seconds(100) == 1800.0  # but a lasting change does
