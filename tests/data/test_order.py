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
    """Uneven shards, some empty, any number of lanes that they can fill, any number of samples a lane in a batch."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any))
    lanes = draw(st.integers(1, sum(sizes)))
    batch_size = lanes * draw(st.integers(1, 4))
    return SampleOrder(sizes, batch_size=batch_size, lanes=lanes, seed=draw(st.integers(0, 2**32)))


def copy_of(order: SampleOrder) -> SampleOrder:
    return SampleOrder(order.shard_sizes, batch_size=order.batch_size, lanes=order.lanes, seed=order.seed)


def part_of(order: SampleOrder, visit: Visit) -> tuple[int, int]:
    """The part of a shard that a visit reads: the shard itself, if there are as many as lanes."""
    return visit.shard, visit.index % order._sets[0].per_shard


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
def test_a_lane_finishes_its_epoch_and_each_part_of_a_shard_before_the_next(order: SampleOrder):
    for stream in lane_streams(order, epochs=2):
        epochs = [visit.epoch for visit in stream]
        assert epochs == sorted(epochs)
        runs = [key for key, _ in itertools.groupby((visit.epoch, part_of(order, visit)) for visit in stream)]
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
    """Lanes differ in length, so in epoch too; each still visits its own parts of shards whole."""
    (parts,) = order._sets
    for lane, stream in enumerate(lane_streams(order, epochs=1)):
        own = permutation(len(parts.sizes), "shards", order.seed, 0)[lane :: order.lanes]
        first = [visit for visit in stream if visit.epoch == 0]
        assert len(first) == sum(parts.sizes[number] for number in own)
        assert {part_of(order, visit) for visit in first} == {parts._parts[number] for number in own}


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
        ([3, 3], 14, 7, "data.lanes is 7 but there are 6 samples: leave data.lanes out, or give 1 to 6"),
        ([3, 3], 4, 0, "data.lanes is 0"),
        ([], 4, 1, "there are no samples"),
        ([0, 0], 4, 1, "there are no samples: give shards that hold some"),
        ([3, 3], 5, 2, r"data.batch_size is 5, expected a multiple of data.lanes \(2\)"),
    ],
)
def test_what_cannot_be_dealt_is_refused(sizes: list[int], batch_size: int, lanes: int, told: str):
    with pytest.raises(ValueError, match=told):
        SampleOrder(sizes, batch_size=batch_size, lanes=lanes, seed=0)


@given(orders(), st.integers(0, 20), st.data())
def test_ranks_share_a_batch_whether_or_not_they_divide_the_lanes(order: SampleOrder, number: int, data: st.DataObject):
    """Of one lane, too: the content of a batch is no function of the ranks."""
    ranks = data.draw(st.sampled_from([ranks for ranks in range(1, 9) if order.batch_size % ranks == 0]))
    shares = [copy_of(order).batch(number, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert {len(share) for share in shares} == {order.batch_size // ranks}
    assert [visit for share in shares for visit in share] == order.batch(number)


def test_one_shard_is_dealt_to_several_lanes_by_sample():
    order = SampleOrder([7], batch_size=6, lanes=3, seed=0)
    read: list[set[int]] = [set(), set(), set()]
    for visit in itertools.chain.from_iterable(order.batch(number) for number in range(2)):
        if visit.epoch == 0:
            read[visit.lane].add(visit.index)
    assert sorted(map(sorted, read)) == [[0, 3, 6], [1, 4], [2, 5]]


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
        own = order._sets[0]
        number = own._numbers[part_of(order, visit)]
        visited = permutation(own.sizes[number], "samples", order.seed, visit.epoch, number)
        assert visited[visit.before] == visit.index // own.per_shard


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 9))
def test_an_empty_shard_changes_nothing_for_the_others(sizes: list[int], place: int):
    place = min(place, len(sizes))
    plain = SampleOrder(sizes, batch_size=2, lanes=1, seed=5)
    gapped = SampleOrder([*sizes[:place], 0, *sizes[place:]], batch_size=2, lanes=1, seed=5)
    for number in range(9):
        moved = [(visit.shard + (visit.shard >= place), visit.index) for visit in plain.batch(number)]
        assert [(visit.shard, visit.index) for visit in gapped.batch(number)] == moved


@given(orders())
def test_the_shards_from_a_visit_on_are_those_that_its_lane_reads(order: SampleOrder):
    for stream in lane_streams(order, epochs=3):
        first = next(visit for visit in stream if visit.epoch == 1)
        parts = dict.fromkeys((v.epoch, part_of(order, v)) for v in stream if v.epoch >= 1)
        read = [shard for _, (shard, _) in parts]
        assert list(itertools.islice(order.shards_from(first), len(read))) == read


@pytest.mark.parametrize(
    ("batch_size", "shards", "lanes"),
    [(64, 8, 8), (64, 100, 32), (48, 100, 24), (4, 8, 4), (64, 1, 1), (67, 50, 1), (60, 7, 6), (1, 9, 1)],
)
def test_by_default_there_are_as_many_lanes_as_batch_and_shards_allow(batch_size: int, shards: int, lanes: int):
    assert default_lanes(batch_size, shards) == lanes
    SampleOrder([3] * shards, batch_size=batch_size, lanes=lanes, seed=0).batch(0)


@pytest.mark.parametrize(
    ("batch_size", "lanes", "ranks", "remedy"), [(64, 8, 3, 72), (64, 1, 3, 66), (9, 1, 2, 10), (8, 4, 16, 16)]
)
def test_what_ranks_are_told_to_change_lets_them_start(batch_size: int, lanes: int, ranks: int, remedy: int):
    def start(batch_size: int) -> None:
        SampleOrder([9] * 8, batch_size=batch_size, lanes=lanes, seed=0).batch(0, ranks=ranks)

    told = f"data.batch_size is {batch_size}, expected a multiple of the {ranks} ranks: give data.batch_size={remedy}$"
    with pytest.raises(ValueError, match=told):
        start(batch_size)
    start(remedy)
