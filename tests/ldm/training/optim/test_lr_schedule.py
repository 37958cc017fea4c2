"""Learning-rate schedules: values at every boundary."""

import pytest

from ldm.training.optim.lr_schedule import LRConfig, lr_at

KINDS = ["constant", "cosine", "wsd", "inverse_sqrt"]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_evenly_and_wastes_no_step(kind):
    config = LRConfig(schedule=kind, lr=2.0, warmup_steps=4)
    assert [lr_at(config, step, 1000) for step in range(4)] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert lr_at(config, 4, 1000) == pytest.approx(2.0 if kind != "inverse_sqrt" else 2.0 * (4 / 5) ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_without_warm_up_the_first_step_has_the_full_rate(kind):
    assert lr_at(LRConfig(schedule=kind, lr=3e-4), 0, 100) == pytest.approx(3e-4)


def test_constant_stays():
    config = LRConfig(schedule="constant", lr=1.0, warmup_steps=10)
    assert all(lr_at(config, step, 100) == 1.0 for step in (9, 50, 99, 100, 500))


def test_wsd_is_flat_then_linear():
    config = LRConfig(schedule="wsd", lr=1.0, warmup_steps=10, decay_fraction=0.4)
    values = [lr_at(config, step, 100) for step in (9, 59, 60, 61, 80, 99, 100, 150)]
    assert values == pytest.approx([1.0, 1.0, 1.0, 39 / 40, 0.5, 1 / 40, 0.0, 0.0])


def test_wsd_over_all_steps_is_linear_decay():
    config = LRConfig(schedule="wsd", lr=1.0, decay_fraction=1.0)
    assert [lr_at(config, step, 8) for step in (0, 2, 4, 7, 8)] == pytest.approx([1, 0.75, 0.5, 0.125, 0])


def test_cosine():
    config = LRConfig(schedule="cosine", lr=1.0, warmup_steps=20)
    values = [lr_at(config, step, 120) for step in (20, 45, 70, 95, 120, 130)]
    half_root = 0.5**0.5
    assert values == pytest.approx([1, (1 + half_root) / 2, 0.5, (1 - half_root) / 2, 0, 0], abs=1e-12)


def test_inverse_sqrt():
    """Flat where warm-up ends, half after four times as many steps, and never 0: however long the run is to be."""
    config = LRConfig(schedule="inverse_sqrt", lr=1.0, warmup_steps=20)
    values = [lr_at(config, step, 120) for step in (9, 19, 20, 79, 119, 179, 1999)]
    assert values == pytest.approx([0.5, 1, (20 / 21) ** 0.5, 0.5, 6**-0.5, 1 / 3, 0.1])
    assert [lr_at(config, step, 10**6) for step in (9, 79, 1999)] == [lr_at(config, step, 30) for step in (9, 79, 1999)]


@pytest.mark.parametrize("warmup_steps", [1, 4, 4000])
def test_inverse_sqrt_is_the_papers_up_to_its_peak(warmup_steps):
    """Vaswani et al. 2017 (arXiv 1706.03762), eq. 3, whose steps are counted from 1."""

    def paper(number: int) -> float:
        return 512**-0.5 * min(number**-0.5, number * warmup_steps**-1.5)

    config = LRConfig(schedule="inverse_sqrt", lr=paper(warmup_steps), warmup_steps=warmup_steps)
    for number in (1, 2, 3, 4, 5, 3999, 4000, 4001, 10**6):
        assert lr_at(config, number - 1, 10**6) == pytest.approx(paper(number))


def test_inverse_sqrt_without_warm_up_falls_from_the_first_step():
    config = LRConfig(schedule="inverse_sqrt", lr=1.0)
    assert [lr_at(config, step, 100) for step in (0, 1, 3, 8)] == pytest.approx([1, 0.5**0.5, 0.5, 1 / 3])


@pytest.mark.parametrize("kind", ["cosine", "wsd", "inverse_sqrt"])
def test_last_step_still_learns(kind):
    config = LRConfig(schedule=kind, lr=1.0, decay_fraction=0.1)
    for total in (1, 3, 10, 1000):
        assert 0 < lr_at(config, total - 1, total) <= 1


def test_where_warm_up_meets_decay_the_lower_holds():
    config = LRConfig(schedule="wsd", lr=1.0, warmup_steps=10, decay_fraction=1.0)
    assert [lr_at(config, step, 10) for step in (0, 4, 5, 9)] == pytest.approx([0.1, 0.5, 0.5, 0.1])
    # A trial run of fewer steps than the warm-up is not an error.
    assert [lr_at(LRConfig(schedule="cosine", lr=1.0, warmup_steps=10), step, 3) for step in range(3)] == pytest.approx(
        [0.1, 0.2, 0.3]
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "linear"}, "'linear' is unknown; choose one of .*'wsd'"),
        ({"lr": 0.0}, "above 0, not 0.0"),
        ({"lr": float("nan")}, "above 0, not nan"),
        ({"warmup_steps": -1}, "0 or more, not -1"),
        ({"decay_fraction": 0.0}, "above 0 and at most 1, not 0.0"),
        ({"decay_fraction": 1.1}, "above 0 and at most 1, not 1.1"),
    ],
)
def test_wrong_configs_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        LRConfig(**{"lr": 1.0, **wrong})
