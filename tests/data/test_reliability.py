"""Data lose nothing: some of the plans and shards of benchmarks/reliability_data.py, and that these can fail."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from helpers.plans import check_plan
from helpers.shard_damages import check_shard
from hypothesis import given, settings
from hypothesis import strategies as st

import data.order
from data.bad_samples import BadSample
from data.loader import CaptionedImages
from data.order import Mixture, SampleOrder, SetOrder, Visit
from data.shards import Shard

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "reliability_data.py"


@settings(max_examples=150)
@given(st.integers(0, 2**63))
def test_any_plan_is_exact(seed: int):
    """1 to 8 ranks, 0 to 4 threads, 1 to 37 shards, sets, and a resume on other ranks."""
    check_plan(seed)


@pytest.mark.parametrize("tens", range(10))
def test_every_sample_of_a_damaged_shard_is_accounted_for(tmp_path: Path, tens: int):
    found = {check_shard(10 * tens + one, fresh(tmp_path / str(one))) for one in range(10)}
    assert found & {"some rejected", "all rejected"}  # damage shows


def fresh(folder: Path) -> Path:
    folder.mkdir()
    return folder


def plans_fail(message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        for seed in range(30):
            check_plan(seed)


def test_a_plan_that_repeats_a_sample_is_found(monkeypatch: pytest.MonkeyPatch):
    def repeats(size: int, *key: object) -> tuple[int, ...]:
        return (0, *range(size - 1))

    monkeypatch.setattr(data.order, "permutation", repeats)
    plans_fail("a sample comes twice|a shard is left out")


def test_a_plan_whose_epochs_lose_a_shard_is_found(monkeypatch: pytest.MonkeyPatch):
    """As if the shards were dealt anew in the middle of an epoch."""
    dealt = SetOrder._lane_parts

    def loses(self: SetOrder, lane: int, epoch: int) -> Sequence[int]:
        return dealt(self, lane, epoch)[: -1 if len(self.sizes) > 2 * self.lanes else None]

    monkeypatch.setattr(SetOrder, "_lane_parts", loses)
    plans_fail("a shard is left out of an epoch")


def test_a_plan_that_depends_on_the_ranks_is_found(monkeypatch: pytest.MonkeyPatch):
    batch = SampleOrder.batch

    def by_rank(self: SampleOrder, number: int, *, rank: int = 0, ranks: int = 1) -> list[Visit]:
        return batch(self, number + (ranks > 2), rank=rank, ranks=ranks)

    monkeypatch.setattr(SampleOrder, "batch", by_rank)
    plans_fail("ranks, threads or a resume change it")


def test_a_plan_that_depends_on_what_was_asked_before_is_found(monkeypatch: pytest.MonkeyPatch):
    """A table of the latest epoch that is not looked at again, as a cache may be forgotten."""

    def stale(self: SetOrder, lane: int, epoch: int) -> tuple[Sequence[int], list[int]]:
        if lane not in self._tables or self._tables[lane][0] < epoch:
            self._tables.pop(lane, None)
            return table(self, lane, epoch)
        return self._tables[lane][1], self._tables[lane][2]

    table = SetOrder._table
    monkeypatch.setattr(SetOrder, "_table", stale)
    with pytest.raises((AssertionError, IndexError)):
        for seed in range(30):
            check_plan(seed)


def test_a_mixture_without_its_shares_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Mixture, "_first", lambda self, low, middle, high, lane, count: (count + 1) // 2)
    plans_fail("a set has not its share")


@pytest.mark.parametrize("error", [KeyError("strange"), MemoryError()])
def test_a_shard_that_raises_something_else_is_found(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fails(raw: object, size: int) -> torch.Tensor:
        raise error

    monkeypatch.setattr("data.readers.decode_pixels", fails)
    with pytest.raises(type(error)):
        for seed in range(10):
            check_shard(seed, fresh(tmp_path / str(seed)))


def shards_fail(folder: Path, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        for seed in range(60):
            check_shard(seed, fresh(folder / str(seed)))


def test_a_reader_that_fills_the_gaps_with_others_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read, key = Shard.__getitem__, Shard.key
    monkeypatch.setattr(Shard, "__getitem__", lambda self, index: read(self, index % len(self._table)))
    monkeypatch.setattr(Shard, "key", lambda self, index: key(self, index % len(self._table)))
    shards_fail(tmp_path, "the delivered are not different")


def test_a_reader_that_stops_at_the_first_damage_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data.tar._next_header", lambda file, start: None)
    shards_fail(tmp_path, r"\d+ are lost, where \d+ can be")


def test_a_list_that_does_not_agree_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def under_one_place(self: CaptionedImages, place: tuple[int, int], bad: BadSample) -> None:
        self.bad_samples[place] = self.bad_samples[0, -1] = bad

    monkeypatch.setattr(CaptionedImages, "_report", under_one_place)
    shards_fail(tmp_path, "a rejected sample is not listed")


def test_the_script_tells_what_holds_and_what_does_not():
    words = [sys.executable, str(SCRIPT), "--plans", "5", "--shards", "5", "--seed", "3"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(
        r"^plans: 5 of 5 hold \(5 exact\), \d+ s\nshards: 5 of 5 hold \(.*\), \d+ s\nmemory: ", done.stdout
    )
