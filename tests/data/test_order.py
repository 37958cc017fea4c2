"""The order of samples: complete, the same on any number of ranks, a pure function of the batch's number."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.order import SampleOrder, SetOrder, Visit, default_lanes, keyed_hash, permutation


@st.composite
def orders(draw: st.DrawFn) -> SampleOrder:
    """Uneven shards, any number of lanes that they can fill, any number of samples a lane in a batch."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=6))
    lanes = draw(st.integers(1, len(sizes)))
    batch_size = lanes * draw(st.integers(1, 4))
    return SampleOrder(sizes, batch_size=batch_size, lanes=lanes, seed=draw(st.integers(0, 2**32)))


def copy_of(order: SampleOrder) -> SampleOrder:
    return SampleOrder(order.shard_sizes, batch_size=order.batch_size, lanes=order.lanes, seed=order.seed)


def lane_streams(order: SampleOrder, epochs: int) -> list[list[Visit]]:
    """What each lane visits, until all of them have finished `epochs`."""
    streams: list[list[Visit]] = [[] for _ in range(order.lanes)]
    for number in itertools.count():
        batch = order.batch(number)
        for lane, stream in enumerate(streams):
            stream += batch[lane * order.per_lane : (lane + 1) * order.per_lane]
        if min(stream[-1].epoch for stream in streams) >= epochs:
            return streams
    raise AssertionError("count() does not end")


@given(orders())
def test_an_epoch_of_all_lanes_is_every_sample_once(order: SampleOrder):
    everything = {(shard, index): 1 for shard, size in enumerate(order.shard_sizes) for index in range(size)}
    streams = lane_streams(order, epochs=3)
    for epoch in range(3):
        visited = Counter((v.shard, v.index) for stream in streams for v in stream if v.epoch == epoch)
        assert visited == everything


@given(orders())
def test_a_lane_finishes_its_epoch_and_each_shard_before_the_next(order: SampleOrder):
    for stream in lane_streams(order, epochs=2):
        epochs = [visit.epoch for visit in stream]
        assert epochs == sorted(epochs)
        runs = [key for key, _ in itertools.groupby((visit.epoch, visit.shard) for visit in stream)]
        assert len(runs) == len(set(runs))


@given(orders(), st.integers(0, 40))
def test_positions_count_through_the_batches(order: SampleOrder, number: int):
    positions = [visit.position for visit in order.batch(number)]
    assert positions == list(range(number * order.batch_size, (number + 1) * order.batch_size))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_content_of_a_batch_is_the_same_on_any_number_of_ranks(ranks: int):
    order = SampleOrder([3, 5, 2, 7, 1, 4, 6, 2, 9], batch_size=24, lanes=8, seed=5)
    for number in range(12):
        shares = [copy_of(order).batch(number, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert [len(share) for share in shares] == [24 // ranks] * ranks
        assert [visit for share in shares for visit in share] == order.batch(number)


@given(orders(), st.permutations(range(20)))
def test_a_batch_does_not_depend_on_what_was_asked_before(order: SampleOrder, numbers: list[int]):
    sequential = [order.batch(number) for number in range(20)]
    fresh = copy_of(order)
    assert {number: fresh.batch(number) for number in numbers} == dict(enumerate(sequential))
    assert copy_of(order).batch(19) == sequential[19]


def test_several_threads_see_the_order_of_one(monkeypatch: pytest.MonkeyPatch):
    """The table of epochs grows when it is asked: two threads must not both add the same epoch."""
    sequential = [SampleOrder([2, 3], batch_size=2, lanes=2, seed=1).batch(number) for number in range(12)]
    length = SetOrder._length

    def slow_length(self: SetOrder, shards: Sequence[int]) -> int:
        time.sleep(0.002)
        return length(self, shards)

    monkeypatch.setattr(SetOrder, "_length", slow_length)
    shared = SampleOrder([2, 3], batch_size=2, lanes=2, seed=1)
    found: dict[int, list[Visit]] = {}
    start = threading.Barrier(4)

    def work(first: int) -> None:
        start.wait()
        for number in range(first, 12, 4):
            found[number] = shared.batch(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(12)] == sequential


@given(orders())
def test_the_epochs_of_uneven_lanes_drift_apart_but_lose_nothing(order: SampleOrder):
    """Lanes differ in length, so in epoch too; each still visits its own shards whole."""
    for lane, stream in enumerate(lane_streams(order, epochs=1)):
        own = permutation(len(order.shard_sizes), "shards", order.seed, 0)[lane :: order.lanes]
        first = [visit for visit in stream if visit.epoch == 0]
        assert len(first) == sum(order.shard_sizes[shard] for shard in own)
        assert {visit.shard for visit in first} == set(own)


def test_epochs_and_seeds_are_shuffled_differently():
    def epoch(seed: int, number: int) -> list[tuple[int, int]]:
        order = SampleOrder([20] * 4, batch_size=80, lanes=1, seed=seed)
        return [(visit.shard, visit.index) for visit in order.batch(number)]

    seen = [epoch(0, 0), epoch(0, 1), epoch(0, 2), epoch(1, 0), epoch(2, 0), sorted(epoch(0, 0))]
    assert all(a != b for a, b in itertools.combinations(seen, 2))
    assert all(sorted(a) == seen[-1] for a in seen)


def test_the_shards_of_a_lane_change_from_epoch_to_epoch():
    """Were the shards dealt once, samples of different lanes would never trade places."""
    order = SampleOrder([1] * 16, batch_size=16, lanes=4, seed=3)
    lanes = [{visit.shard for visit in order.batch(epoch)[:4]} for epoch in range(6)]
    assert len(set(map(frozenset, lanes))) > 1


@given(st.integers(0, 60), st.integers(0, 2**32), st.integers(0, 5))
def test_a_permutation_is_one(size: int, seed: int, epoch: int):
    assert sorted(permutation(size, "samples", seed, epoch)) == list(range(size))


def test_the_order_never_changes_between_versions():
    """A run that a newer version resumes must see the samples still to come: change no number."""
    assert keyed_hash("caption", 0, 7) == 4626730774425818275
    assert tuple(permutation(8, "shards", 0, 0)) == (0, 2, 1, 7, 3, 5, 4, 6)
    order = SampleOrder([3, 2, 4, 1], batch_size=4, lanes=2, seed=42)
    expected = {
        0: [(0, 3, 0), (0, 1, 0), (0, 0, 2), (0, 0, 0)],
        1: [(0, 1, 1), (1, 0, 2), (0, 0, 1), (0, 2, 2)],
        5: [(2, 1, 1), (2, 1, 0), (2, 0, 2), (2, 0, 1)],
    }
    for number, visits in expected.items():
        assert [(v.epoch, v.shard, v.index) for v in order.batch(number)] == visits


@pytest.mark.parametrize(
    ("sizes", "batch_size", "lanes", "told"),
    [
        ([3, 3], 9, 3, "data.lanes is 3 but there are 2 shards"),
        ([3, 3], 4, 0, "data.lanes is 0"),
        ([], 4, 1, "0 shards"),
        ([3, 3], 5, 2, r"data.batch_size is 5, expected a multiple of data.lanes \(2\)"),
        ([3, 0], 4, 2, "a shard is empty"),
    ],
)
def test_what_cannot_be_dealt_is_refused(sizes: list[int], batch_size: int, lanes: int, told: str):
    with pytest.raises(ValueError, match=told):
        SampleOrder(sizes, batch_size=batch_size, lanes=lanes, seed=0)


@pytest.mark.parametrize("ranks", [3, 8])
def test_ranks_that_do_not_divide_the_lanes_are_refused(ranks: int):
    order = SampleOrder([2] * 4, batch_size=8, lanes=4, seed=0)
    with pytest.raises(ValueError, match=f"data.lanes is 4, expected a multiple of the {ranks} ranks"):
        order.batch(0, rank=0, ranks=ranks)


def test_the_order_of_one_set_is_that_of_earlier_versions():
    """The digest of 2,400 visits, taken before there were mixtures."""
    order = SampleOrder([20, 31, 7, 9, 11, 3, 14], batch_size=12, lanes=4, seed=2024)
    digest = sha256()
    for number in range(200):
        for visit in order.batch(number):
            digest.update(repr((visit.position, visit.epoch, visit.shard, visit.index)).encode())
    assert digest.hexdigest() == "e08b263fe1ef029e056404f762a467104b2282b386e23d7dc443d4327f3f0632"


@given(orders(), st.integers(0, 15))
def test_a_visit_knows_its_lane_and_how_much_of_its_shard_stands_before_it(order: SampleOrder, number: int):
    for place, visit in enumerate(order.batch(number)):
        assert visit.lane == place // order.per_lane
        visited = permutation(order.shard_sizes[visit.shard], "samples", order.seed, visit.epoch, visit.shard)
        assert visited[visit.before] == visit.index


@given(orders())
def test_the_shards_from_a_visit_on_are_those_that_its_lane_reads(order: SampleOrder):
    for stream in lane_streams(order, epochs=3):
        first = next(visit for visit in stream if visit.epoch == 1)
        read = [shard for _, shard in dict.fromkeys((v.epoch, v.shard) for v in stream if v.epoch >= 1)]
        assert list(itertools.islice(order.shards_from(first), len(read))) == read


@pytest.mark.parametrize(
    ("batch_size", "shards", "lanes"),
    [(64, 8, 8), (64, 100, 32), (48, 100, 24), (4, 8, 4), (64, 1, 1), (67, 50, 1), (60, 7, 6), (1, 9, 1)],
)
def test_by_default_there_are_as_many_lanes_as_batch_and_shards_allow(batch_size: int, shards: int, lanes: int):
    assert default_lanes(batch_size, shards) == lanes
    SampleOrder([3] * shards, batch_size=batch_size, lanes=lanes, seed=0).batch(0)


@pytest.mark.parametrize(
    ("batch_size", "shards", "ranks", "remedy", "then"),
    [
        (48, 8, 3, "give data.lanes=6", (48, 6, 8, 3)),
        (64, 8, 3, "give data.lanes=3 and data.batch_size=66", (66, 3, 8, 3)),
        (64, 1, 2, "split the data into at least 2 shards, or start fewer ranks", (64, 2, 2, 2)),
    ],
)
def test_what_ranks_are_told_to_change_lets_them_start(
    batch_size: int, shards: int, ranks: int, remedy: str, then: tuple[int, int, int, int]
):
    def start(batch_size: int, lanes: int, shards: int, ranks: int) -> None:
        SampleOrder([3] * shards, batch_size=batch_size, lanes=lanes, seed=0).batch(0, ranks=ranks)

    with pytest.raises(ValueError, match=f"expected a multiple of the {ranks} ranks: {remedy}$"):
        start(batch_size, default_lanes(batch_size, shards), shards, ranks)
    start(*then)
