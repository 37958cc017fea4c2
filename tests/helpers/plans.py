"""Random plans of the order of samples, and what must hold of each: the suite checks some, a benchmark thousands."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial

from data.order import SampleOrder, SetSpan, Visit

Drawn = random.Random


def check_plan(seed: int) -> None:
    """Raises AssertionError where the plan of that seed does not hold."""
    draw = Drawn(seed)
    ranks = draw.randint(1, 8)
    sets = draw.choice([count for count in (1, 1, 2, 3) if 37 // count >= ranks])
    most = 37 // sets  # shards of a set
    lanes = ranks * draw.randint(1, min(most // ranks, 3))
    counts = [draw.randint(lanes, most) for _ in range(sets)]
    sizes = [draw.choice((1, draw.randint(1, 4), draw.randint(1, 40))) for _ in range(sum(counts))]
    weights = [Fraction(draw.randint(1, 9), draw.randint(1, 9)) for _ in counts]
    spans = [SetSpan(str(n), weight, count) for n, (weight, count) in enumerate(zip(weights, counts, strict=True))]
    batch_size, order_seed = lanes * draw.randint(1, 6), draw.randrange(2**32)

    def order() -> SampleOrder:
        own = spans if sets > 1 else ()  # as data.loader makes it
        return SampleOrder(sizes, batch_size=batch_size, lanes=lanes, seed=order_seed, sets=own)

    one = order()
    whole = [one.batch(number) for number in range(min(3 * sets * sum(sizes), 3000) // batch_size + 2)]
    set_of = [which for which, count in enumerate(counts) for _ in range(count)]  # of each shard
    _check_once(whole, sizes, set_of)
    _check_shares(whole, order, lanes, draw)
    _check_mixture(whole, set_of, weights)


def _check_once(whole: list[list[Visit]], sizes: list[int], set_of: list[int]) -> None:
    """Positions follow one another; no sample comes twice in an epoch of its set, none is left out of a whole one."""
    positions = [visit.position for batch in whole for visit in batch]
    assert positions == list(range(len(positions))), "positions do not count through"
    seen: dict[tuple[int, int], Counter[int]] = {}
    ended: set[tuple[int, int]] = set()
    latest: dict[tuple[int, int], tuple[int, int]] = {}
    for visit in (visit for batch in whole for visit in batch):
        place = (visit.epoch, visit.shard)
        seen.setdefault(place, Counter())[visit.index] += 1
        stream = (visit.lane, set_of[visit.shard])
        if latest.get(stream, place) != place:
            ended.add(latest[stream])
        latest[stream] = place
    for place, indices in seen.items():
        assert max(indices.values()) == 1, "a sample comes twice in an epoch"
        assert indices.keys() <= set(range(sizes[place[1]])), "there is no such sample"
        assert place not in ended or len(indices) == sizes[place[1]], "a sample is left out of an epoch"
    _check_epochs(whole, len(sizes), set_of)


def _check_epochs(whole: list[list[Visit]], shards: int, set_of: list[int]) -> None:
    """Of an epoch that all lanes have left, every shard of the set has been visited."""
    visited: dict[tuple[int, int], set[int]] = {}
    lanes_at: dict[int, dict[int, int]] = {}
    for visit in (visit for batch in whole for visit in batch):
        visited.setdefault((set_of[visit.shard], visit.epoch), set()).add(visit.shard)
        lanes_at.setdefault(set_of[visit.shard], {})[visit.lane] = visit.epoch
    every_lane = len({visit.lane for visit in whole[0]})
    for which, at in lanes_at.items():
        own = {shard for shard in range(shards) if set_of[shard] == which}
        for epoch in range(min(at.values()) if len(at) == every_lane else 0):
            assert visited[which, epoch] == own, "a shard is left out of an epoch"


def _check_shares(whole: list[list[Visit]], order: Callable[[], SampleOrder], lanes: int, draw: Drawn) -> None:
    """From a drawn batch on, on drawn numbers of ranks, by 0 to 4 threads that ask for batches in any order."""
    divisors = [ranks for ranks in range(1, 9) if lanes % ranks == 0]
    for _ in range(2):
        ranks, threads = draw.choice(divisors), draw.randint(0, 4)
        numbers = list(range(draw.randrange(len(whole)), len(whole)))[:40]
        for rank in range(ranks):
            size, mixed = len(whole[0]) // ranks, draw.sample(numbers, len(numbers))
            share_of = partial(order().batch, rank=rank, ranks=ranks)
            if threads:
                with ThreadPoolExecutor(threads) as pool:
                    found = list(pool.map(share_of, mixed))
            else:
                found = list(map(share_of, mixed))
            for number, share in zip(mixed, found, strict=True):
                assert share == whole[number][rank * size : (rank + 1) * size], "ranks, threads or a resume change it"


def _check_mixture(whole: list[list[Visit]], set_of: list[int], weights: list[Fraction]) -> None:
    """After any number of samples each lane has had each set's share, within two samples."""
    had: Counter[tuple[int, int]] = Counter()
    length: Counter[int] = Counter()
    for visit in (visit for batch in whole for visit in batch):
        had[visit.lane, set_of[visit.shard]] += 1
        length[visit.lane] += 1
        which = set_of[visit.shard]
        share = weights[which] / sum(weights) * length[visit.lane]
        assert abs(had[visit.lane, which] - share) < 2, "a set has not its share"
