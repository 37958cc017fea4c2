"""Batches of several sets, of remote and damaged shards: what is accounted for, and when a stream stops."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from helpers.accounts import accounts_of
from helpers.loading import BAD, SIZES, first, images, same
from helpers.serving import served, until
from PIL import ImageFile

from data.bad_samples import BadSample, Quarantine
from data.config import DataConfig, HeldOutConfig, ShardSet
from data.loader import CaptionedImages, held_out
from data.manifest import main as write_manifest
from ldm.errors import DataError

# --- mixtures ---


def test_sets_are_mixed_by_weight(tiny_shards: Callable[..., str]):
    folder = Path(tiny_shards([9, 9, 9, 9])).parent
    sets = tuple(
        ShardSet(name=name, shards=(f"{folder}/0000{numbers}.tar",), weight=weight)
        for name, numbers, weight in (("a", "[01]", 3), ("b", "[23]", 1))
    )
    config = DataConfig(sets=sets, image_size=8, batch_size=8, lanes=2)
    batches = first(CaptionedImages(config, seed=1), 40)
    for batch in batches:
        assert sum(shard < 2 for shard, _ in batch.samples) == 6
    resumed = first(CaptionedImages(config, seed=1), 30, position=10)
    assert all(same(a, b) for a, b in zip(batches[10:], resumed, strict=True))
    with pytest.raises(ValueError, match="data.lanes is 19 but there are 18 samples in set a"):
        CaptionedImages(replace(config, lanes=19, batch_size=19), seed=1)


# --- accounts ---


@pytest.mark.parametrize("lanes", [4, 8])
def test_lanes_that_share_a_shard_lose_nothing(tiny_shards: Callable[..., str], lanes: int):
    shards = tiny_shards([9, 7], bad=[(0, 3)])
    loader = images(shards, lanes=lanes, batch_size=8, on_bad=lambda bad: None)
    batches = first(loader, 12)
    closed = accounts_of(loader, batches).closed
    assert len(closed) > 6
    for account in closed:
        assert (account.delivered + account.rejected, account.rejected) == (account.expected, account.shard == 0)
    ranks = [first(images(shards, lanes=lanes, rank=rank, ranks=8, on_bad=lambda bad: None), 12) for rank in range(8)]
    for number, batch in enumerate(batches):
        assert [own[number].samples[0] for own in ranks] == batch.samples


def counted(shards: str) -> str:
    write_manifest([str(Path(shards).parent)])
    return shards


def test_every_sample_of_an_epoch_is_delivered_or_rejected(tiny_shards: Callable[..., str], tmp_path: Path):
    quarantine = Quarantine(tmp_path / "bad_samples.jsonl")
    shards = counted(tiny_shards(SIZES, bad=BAD))
    content = (path := tmp_path / "shards" / "00002.tar").read_bytes()
    path.write_bytes(content[: content.index(b"000020001.txt")])
    loader = images(shards, on_bad=lambda bad: None, quarantine=quarantine)
    closed = accounts_of(loader, first(loader, 20)).closed
    rejected = {0: 0, 1: 2, 2: 1, 3: 1}
    assert len(closed) > 10
    for account in closed:
        assert account.delivered + account.rejected == account.expected == SIZES[account.shard]
        assert account.rejected == rejected[account.shard]
    listed = [json.loads(line) for line in quarantine.path.read_text().splitlines()]
    assert sorted(line["key"] for line in listed) == ["000010000", "000010001", "000020001", "000030002"]
    assert sorted(loader.bad_samples) == [(1, 0), (1, 1), (2, 1), (3, 2)]


def test_each_missing_sample_has_a_stand_in_of_its_own(tiny_shards: Callable[..., str], tmp_path: Path):
    """Were it always the next good one, the first sample of the shard would be shown for all."""
    shards = counted(tiny_shards([12]))
    path = tmp_path / "shards" / "00000.tar"
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"000000006.png")])
    loader = images(shards, batch_size=12, lanes=1, on_bad=lambda bad: None)
    assert sorted(loader.batch(0).samples) == sorted([(0, index) for index in range(6)] * 2)


def test_a_remote_shard_that_is_gone_is_stood_in_for(tiny_shards: Callable[..., str], tmp_path: Path):
    """The others keep their places, and the loss is counted."""
    folder = Path(counted(tiny_shards([3, 5, 2, 4]))).parent
    with served(folder) as site:
        url = f"{site.url}/0000{{0..3}}.tar"
        clean = first(images(url, lanes=2), 14)
        (folder / "00001.tar").unlink()
        told: list[BadSample] = []
        loader = images(url, lanes=2, on_bad=told.append)
        batches = first(loader, 14)
        for a, b in zip(clean, batches, strict=True):
            for asked, given in zip(a.samples, b.samples, strict=True):
                assert given == asked or asked[0] == 1 != given[0]
        assert {(bad.key, "00001.tar" in bad.reason) for bad in told} == {(f"#{index}", True) for index in range(5)}
        for account in accounts_of(loader, batches).closed:
            assert (account.rejected > 0) == (account.shard == 1)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_too_many_bad_samples_stop_the_stream(tiny_shards: Callable[..., str], tmp_path: Path, prefetch: int):
    bad = [(shard, index) for shard in range(4) for index in range(0, 40, 8)]
    quarantine = Quarantine(tmp_path / "bad.jsonl")
    settings = {"prefetch": prefetch, "quarantine": quarantine, "on_bad": lambda bad: None}
    shards = tiny_shards([40] * 4, bad=bad)
    told = (
        r"\d+ of the last \d+ samples cannot be used, more than max_bad_fraction \(0\.01\) allows; most frequent "
        rf"reason: the image does not decode\. See {quarantine.path}: repair"
    )
    with pytest.raises(DataError, match=told):
        first(images(shards, **settings), 100)
    assert len(first(images(shards, **settings, max_bad_fraction=0.2), 60)) == 60
    with pytest.raises(DataError, match=r"of the last \d+ samples cannot be used, .* See the lines above: repair"):
        list(images(shards, on_bad=lambda bad: None).once(50))


def test_too_many_missing_samples_stop_the_stream(tiny_shards: Callable[..., str], tmp_path: Path):
    shards = counted(tiny_shards([40] * 4))
    path = tmp_path / "shards" / "00002.tar"
    path.write_bytes(path.read_bytes()[:30_000])
    with pytest.raises(DataError, match=r"\d+ of 160 samples are missing, more than .*0\.01.* reason: it is missing"):
        first(images(shards, on_bad=lambda bad: None), 100)
    assert len(first(images(shards, on_bad=lambda bad: None, max_bad_fraction=0.3), 60)) == 60


def test_the_first_hundred_bad_samples_are_told_and_all_are_listed(tiny_shards: Callable[..., str], tmp_path: Path):
    told: list[BadSample] = []
    quarantine = Quarantine(tmp_path / "bad.jsonl")
    shards = tiny_shards([150], bad=[(0, index) for index in range(120)])
    loader = images(
        shards, lanes=1, batch_size=50, on_bad=told.append, quarantine=quarantine, max_bad_fraction=1, prefetch=0
    )
    first(loader, 3)
    assert len(told) == 100 and len(quarantine.path.read_text().splitlines()) == 120


def test_pictures_cut_short_are_never_let_pass(tiny_shards: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="LOAD_TRUNCATED_IMAGES is set"):
        images(tiny_shards(SIZES))


def test_a_pipe_is_read_where_that_is_allowed(tiny_shards: Callable[..., str], tmp_path: Path):
    folder = Path(tiny_shards(SIZES)).parent
    pipe, out = f"pipe:cat {folder}/0000{{0..3}}.tar", str(tmp_path / "manifest.json")
    write_manifest([pipe, "--out", out])
    clean = first(images(f"{folder}/*.tar"), 5)
    piped = first(images(pipe, allow_pipe=True, manifest=out), 5)
    assert all(torch.equal(a.pixels, b.pixels) and a.samples == b.samples for a, b in zip(clean, piped, strict=True))
    held = HeldOutConfig(shards=pipe, allow_pipe=True, manifest=out)
    assert sum(len(batch.captions) for batch in held_out(held, image_size=8).once(4)) == 14
    with pytest.raises(ValueError, match="runs a shell command"):
        images(pipe, manifest=out)


def test_the_next_shard_of_each_lane_is_fetched_while_this_one_is_read(tiny_shards: Callable[..., str]):
    folder = Path(counted(tiny_shards([6, 6, 6, 6]))).parent
    with served(folder) as site:
        loader = images(f"{site.url}/0000{{0..3}}.tar", lanes=1, batch_size=1, prefetch=0)
        present, following = (loader.order.batch(number)[0].shard for number in (0, 6))
        site.requests.clear()
        loader.batch(0)
        until(lambda: site.count(f"{following:05d}.tar") == 1)
        assert site.count(f"{present:05d}.tar") == 1 and len(site.requests) == 2


def test_a_shard_that_cannot_be_made_ready_is_not_asked_for_over_and_over(tiny_shards: Callable[..., str]):
    """Its place is tried once ahead, and once more when it is reached, unless that is at the same time."""
    folder = Path(counted(tiny_shards([30, 30]))).parent
    with served(folder) as site:
        loader = images(f"{site.url}/0000{{0..1}}.tar", lanes=1, batch_size=1, prefetch=0, on_bad=lambda bad: None)
        (following,) = {0, 1} - {loader.order.batch(0)[0].shard}
        (folder / f"{following:05d}.tar").unlink()
        site.requests.clear()
        for number in range(45):
            loader.batch(number)
        assert 1 <= site.count(f"{following:05d}.tar") <= 2


@pytest.mark.parametrize(("gone", "stops"), [(2, False), (3, True)])
def test_a_place_out_of_reach_is_waited_for_no_longer_than_for_three_shards(
    tiny_shards: Callable[..., str], gone: int, stops: bool
):
    shards = counted(tiny_shards([4] * 6))
    loader = images(shards, lanes=1, batch_size=2, on_bad=lambda bad: None)
    near = list(dict.fromkeys(islice(loader.order.shards_from(loader.order.batch(0)[0]), 6)))
    for shard in near[1 : 1 + gone]:
        (Path(shards).parent / f"{shard:05d}.tar").unlink()
    if stops:
        with pytest.raises(DataError, match=rf"no sample of shard \S*{near[1]:05d}\.tar can be used.* No such file"):
            first(loader, 12)
    else:
        batches = first(loader, 12)
        given = {shard for batch in batches for shard, _ in batch.samples}
        assert given == set(near) - set(near[1:3])
        assert accounts_of(loader, batches).rejected == 4 * gone
