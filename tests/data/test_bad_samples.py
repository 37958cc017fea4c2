"""Accounts: from visits alone, whole wherever a run was resumed; and when the share of bad samples is too high."""

from __future__ import annotations

import random

import pytest
from helpers.accounts import Account, Ledger

from data.bad_samples import WINDOW, BadShare
from data.order import SampleOrder

BAD = {(0, 1), (2, 0), (2, 2)}


def order() -> SampleOrder:
    return SampleOrder([3, 2, 4, 1], batch_size=2, lanes=2, seed=3)


def kept(batches: range) -> Ledger:
    ledger = Ledger(order().shard_sizes)
    for number in batches:
        visits = order().batch(number)
        given = [(v.shard, v.index) if (v.shard, v.index) not in BAD else (v.shard, 3 * v.index + 1) for v in visits]
        ledger.record(visits, given)
    return ledger


def test_an_account_is_closed_with_the_last_of_its_samples():
    ledger = kept(range(40))
    assert len(ledger.closed) > 20
    for account in ledger.closed:
        rejected = sum(shard == account.shard for shard, _ in BAD)
        expected = order().shard_sizes[account.shard]
        assert account == Account(account.shard, account.epoch, expected, 0, expected - rejected, rejected)
    assert not any(account.is_closed for account in ledger.open.values())
    assert ledger.delivered + ledger.rejected == 80


@pytest.mark.parametrize("start", [1, 7, 23])
def test_a_resumed_run_closes_the_accounts_that_another_opened(start: int):
    """What was visited before is seen from the order; nothing was saved."""
    whole, first, second = kept(range(60)), kept(range(start)), kept(range(start, 60))
    joined = {(a.epoch, a.shard): (a.delivered, a.rejected) for a in first.closed}
    for account in second.closed:
        place = (account.epoch, account.shard)
        before = first.open.get(place)
        if before is None:
            assert account.before == 0
            joined[place] = (account.delivered, account.rejected)
        else:
            assert account.before == before.delivered + before.rejected
            joined[place] = (before.delivered + account.delivered, before.rejected + account.rejected)
    assert joined == {(a.epoch, a.shard): (a.delivered, a.rejected) for a in whole.closed}


def share(good: int, bad: int, *, rounds: int = 1) -> tuple[int, int] | None:
    found = BadShare()
    for _ in range(rounds):
        for number in range(good + bad):
            found.record((0, number), is_bad=number >= good)
    return found.above(0.01)


def test_bad_samples_are_counted_once_among_different_ones():
    assert share(980, 20) == (20, 1000) == share(980, 20, rounds=3)
    assert share(990, 10) is None  # a hundredth is not above it


def test_a_few_bad_samples_or_visits_are_nothing_to_judge_by():
    assert share(15, 1, rounds=500) is None
    assert share(60, 9, rounds=10) is None
    assert share(50, 49) is None
    assert share(50, 50) == (50, 100)


def test_only_the_window_counts():
    found = BadShare()
    for number in range(200):
        found.record((0, number), is_bad=True)
    for number in range(WINDOW - 200):
        found.record((1, number), is_bad=False)
    assert found.above(0.01) == (200, WINDOW)
    for number in range(105):
        found.record((2, number), is_bad=False)
    assert found.above(0.009) == (95, WINDOW) and found.above(0.01) is None


def test_the_window_is_what_a_plain_count_finds():
    draw, found, visits = random.Random(1), BadShare(), []
    for _ in range(WINDOW + 3000):
        sample = (0, draw.randrange(4000))
        visits.append(sample)
        found.record(sample, is_bad=sample[1] < 50)
    last = set(visits[-WINDOW:])
    assert found.above(0.0) == (sum(index < 50 for _, index in last), len(last))
