"""Mixtures: each set gets its share after any number of samples, in each batch; its samples come once an epoch."""

from __future__ import annotations

import itertools
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import Mixture, SampleOrder, SetSpan, Visit

WEIGHTS = st.lists(st.fractions(Fraction(1, 997), 1000, max_denominator=997), min_size=1, max_size=7)


@settings(max_examples=50)
@given(WEIGHTS, st.integers(1, 9), st.integers(0, 2**32), st.integers(0, 10**12))
def test_any_position_is_that_of_a_walk_and_every_share_is_kept(
    weights: list[Fraction], lanes: int, seed: int, far: int
):
    mixture = Mixture(weights, lanes=lanes, seed=seed)
    for lane in range(lanes):
        counts: Counter[int] = Counter()
        for position in range(60):
            which, before = mixture.place(lane, position)
            assert before == counts[which]
            counts[which] += 1
        for position in range(far, far + 20):  # reached without walking
            which, before = mixture.place(lane, position)
            assert abs(before - weights[which] / sum(weights) * position) < 3
            assert counts.setdefault(-1 - which, before) == before
            counts[-1 - which] += 1


def test_a_batch_holds_each_set_by_its_share_even_with_one_sample_a_lane():
    """Were all lanes in the same phase, a batch would be of one set alone."""
    mixture = Mixture([Fraction(1), Fraction(3)], lanes=64, seed=5)
    for number in range(50):
        assert Counter(mixture.place(lane, number)[0] for lane in range(64)) == {0: 16, 1: 48}
    three = Mixture([Fraction(2), Fraction(1), Fraction(1)], lanes=64, seed=5)
    for number in range(50):
        counts = Counter(three.place(lane, number)[0] for lane in range(64))
        assert counts[0] == 32 and 4 <= counts[1] <= 28


def test_the_mixture_never_changes_between_versions():
    mixture = Mixture([Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)], lanes=2, seed=3)
    found = [[mixture.place(lane, position) for position in range(8)] for lane in range(2)]
    assert found == [
        [(0, 0), (1, 0), (0, 1), (0, 2), (0, 3), (2, 0), (0, 4), (0, 5)],
        [(2, 0), (0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (1, 1), (0, 4)],
    ]


def mixed(*, seed: int = 1, names: str = "abc", shards: tuple[int, ...] = (2, 3, 4), lanes: int = 2) -> SampleOrder:
    sizes = [1 + (7 * number) % 5 for number in range(sum(shards))]
    spans = [SetSpan(name, Fraction(weight), own) for name, weight, own in zip(names, (5, 2, 3), shards, strict=False)]
    return SampleOrder(sizes[: sum(shards[: len(names)])], batch_size=2 * lanes, lanes=lanes, seed=seed, sets=spans)


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_every_set_is_visited_whole_each_of_its_epochs(lanes: int):
    order = mixed(lanes=lanes)
    visits: list[Visit] = [visit for number in range(300) for visit in order.batch(number)]
    for first, own in ((0, 2), (2, 3), (5, 4)):
        for epoch in range(3):
            seen = Counter((v.shard, v.index) for v in visits if first <= v.shard < first + own and v.epoch == epoch)
            assert seen == {(s, i): 1 for s in range(first, first + own) for i in range(order.shard_sizes[s])}


def test_a_set_keeps_its_own_order_when_another_is_added():
    def streams(names: str) -> list[list[tuple[int, int, int]]]:
        visits = [visit for number in range(200) for visit in mixed(names=names).batch(number)]
        return [[(v.epoch, v.shard, v.index) for v in visits if v.lane == lane and v.shard < 2][:60] for lane in (0, 1)]

    assert streams("a") == streams("ab") == streams("abc")


def test_sets_are_mixed_on_any_number_of_ranks_alike():
    order = mixed(lanes=2)
    for number in range(20):
        shares = [mixed(lanes=2).batch(number, rank=rank, ranks=2) for rank in range(2)]
        assert list(itertools.chain(*shares)) == order.batch(number)


def test_a_set_with_fewer_samples_than_lanes_is_named():
    with pytest.raises(ValueError, match=r"data.lanes is 5 but there are 4 samples in set a"):
        mixed(lanes=5)
