"""The scale of float16's losses: down at once, up when it has been good for long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ldm.training.engine.engine import LARGEST, PATIENCE, START, LossScale


def after(scale: LossScale, *, good: int = 0, bad: int = 0) -> LossScale:
    for overflowed in [False] * good + [True] * bad:
        scale = scale.after(overflowed=overflowed)
    return scale


def test_an_overflow_halves_it_at_once():
    assert after(LossScale(), bad=1) == LossScale(START / 2, 0)
    assert after(LossScale(), bad=3) == LossScale(START / 8, 0)


def test_patience_doubles_it():
    assert after(LossScale(), good=PATIENCE - 1) == LossScale(START, PATIENCE - 1)
    assert after(LossScale(), good=PATIENCE) == LossScale(2 * START, 0)
    assert after(LossScale(), good=2 * PATIENCE) == LossScale(4 * START, 0)


def test_an_overflow_ends_patience():
    scale = after(after(LossScale(), good=PATIENCE - 1, bad=1), good=PATIENCE - 1)
    assert scale == LossScale(START / 2, PATIENCE - 1)


def test_it_stays_between_its_bounds():
    assert after(LossScale(), bad=100).scale == 1.0
    assert after(LossScale(LARGEST / 2), good=3 * PATIENCE).scale == LARGEST


def test_a_step_changes_nothing_that_was_before():
    scale = LossScale()
    scale.after(overflowed=True)
    assert scale == LossScale(START, 0)


@given(st.lists(st.booleans(), max_size=60), st.integers(0, PATIENCE - 1))
def test_it_is_a_power_of_two_and_is_taken_up_again_as_it_was(overflows: list[bool], good_steps: int):
    """So that scaling rounds nothing, and a resumed run goes on with the same numbers."""
    scale = LossScale(START, good_steps)
    for overflowed in overflows:
        scale = LossScale(**scale._asdict()).after(overflowed=overflowed)
        assert scale == LossScale(**scale._asdict())
        assert 1.0 <= scale.scale <= LARGEST and scale.scale.hex().startswith("0x1.0000000000000p")
