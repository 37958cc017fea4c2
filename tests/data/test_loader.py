"""Batches: what stands for a bad sample, resuming at any batch, ranks, threads, captions."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.loading import BAD, SIZES, first, images, same

from data.bad_samples import BadSample
from data.config import DataConfig, HeldOutConfig
from data.loader import held_out
from data.manifest import main as write_manifest
from data.readers import ImageCaptionReader
from data.shards import BadSampleError, RawSample
from ldm.errors import DataError


def test_pixels_captions_and_samples_belong_together(tiny_shards: Callable[..., str]):
    for batch in first(images(tiny_shards(SIZES), captions="best"), 4):
        assert batch.pixels.shape == (8, 3, 8, 8) and batch.columns.keys() == {"pixels", "captions"}
        for picture, caption, (shard, index) in zip(batch.pixels, batch.captions, batch.samples, strict=True):
            assert caption == f"{shard}/{index}"
            expected = torch.tensor([10.0 * shard, 10.0 * index, 255.0]) / 127.5 - 1
            assert torch.allclose(picture[:, 3, 5], expected, atol=1e-6)


def test_an_epoch_shows_every_sample_once(tiny_shards: Callable[..., str]):
    loader = images(tiny_shards(SIZES), batch_size=1, lanes=1)
    assert len(loader) == 14
    shown = [batch.samples[0] for batch in first(loader, 28)]
    everything = [(shard, index) for shard, size in enumerate(SIZES) for index in range(size)]
    assert sorted(shown[:14]) == sorted(shown[14:]) == everything
    assert shown[:14] != shown[14:]


def test_gzipped_shards_give_the_same_batches(tiny_shards: Callable[..., str], tmp_path: Path):
    plain = first(images(tiny_shards(SIZES)), 3)
    (tmp_path / "shards").rename(tmp_path / "plain")
    zipped = first(images(tiny_shards(SIZES, suffix=".tar.gz")), 3)
    assert all(same(a, b) for a, b in zip(plain, zipped, strict=True))


def test_bad_samples_are_replaced_by_the_next_good_one(tiny_shards: Callable[..., str], tmp_path: Path):
    """The others stay where they are."""
    clean = first(images(tiny_shards(SIZES)), 6)
    (tmp_path / "shards").rename(tmp_path / "clean")
    mended = first(images(tiny_shards(SIZES, bad=BAD), on_bad=lambda bad: None), 6)
    stand_in = {(1, 0): (1, 2), (1, 1): (1, 2), (3, 2): (3, 3)}
    replaced = 0
    for a, b in zip(clean, mended, strict=True):
        assert b.samples == [stand_in.get(sample, sample) for sample in a.samples]
        assert b.positions == a.positions
        for place, sample in enumerate(a.samples):
            if sample in BAD:
                replaced += 1
                shard, index = stand_in[sample]
                assert b.captions[place].startswith(f"{shard}/{index}")
            else:
                assert b.captions[place] == a.captions[place]
                assert torch.equal(b.pixels[place], a.pixels[place])
    assert replaced > 3


def test_the_last_sample_of_a_shard_is_replaced_by_its_first(tiny_shards: Callable[..., str]):
    loader = images(tiny_shards([3], bad=[(0, 2)]), batch_size=3, lanes=1, on_bad=lambda bad: None)
    assert sorted(loader.batch(0).samples) == [(0, 0), (0, 0), (0, 1)]


@pytest.mark.parametrize("prefetch", [0, 3])
def test_bad_samples_are_reported_once(tiny_shards: Callable[..., str], prefetch: int):
    told: list[BadSample] = []
    loader = images(tiny_shards(SIZES, bad=BAD), prefetch=prefetch, on_bad=told.append)
    first(loader, 20)
    assert sorted(loader.bad_samples) == sorted(BAD)
    assert sorted(bad.key for bad in told) == ["000010000", "000010001", "000030002"]
    for bad in told:
        assert bad.shard.endswith(f"{bad.key[:5]}.tar") and "does not decode" in bad.reason


def test_two_threads_that_meet_a_bad_sample_at_once_report_it_once(
    tiny_shards: Callable[..., str], monkeypatch: pytest.MonkeyPatch
):
    both = threading.Barrier(2, timeout=20)

    def decode(raw: RawSample, image_size: int) -> torch.Tensor:
        if raw.key.endswith("1"):
            both.wait()
            raise BadSampleError("bad")
        return torch.zeros(3, image_size, image_size)

    monkeypatch.setattr("data.readers.decode_pixels", decode)
    told: list[BadSample] = []
    first(images(tiny_shards([2]), batch_size=2, lanes=1, on_bad=told.append), 1)
    assert [bad.key for bad in told] == ["000000001"]


def test_by_default_bad_samples_are_printed(tiny_shards: Callable[..., str], capsys: pytest.CaptureFixture[str]):
    images(tiny_shards([2], bad=[(0, 1)]), batch_size=2, lanes=1).batch(0)
    assert capsys.readouterr().out.startswith("bad sample: 000000001 in ")


@pytest.mark.parametrize("prefetch", [0, 2])
def test_where_a_shard_holds_no_good_sample_the_next_of_its_lane_stands_in(
    tiny_shards: Callable[..., str], prefetch: int
):
    shards = tiny_shards([2, 2], bad=[(1, 0), (1, 1)])
    batches = first(images(shards, batch_size=2, lanes=2, prefetch=prefetch, on_bad=lambda bad: None), 6)
    assert {shard for batch in batches for shard, _ in batch.samples} == {0}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_where_nothing_can_stand_in_is_an_error(tiny_shards: Callable[..., str], prefetch: int):
    shards = tiny_shards([2, 1], bad=[(0, 0), (0, 1), (1, 0)])
    with pytest.raises(
        DataError, match=r"no sample of shard .*0000\d\.tar can be used, .* \(the image does not decode"
    ):
        first(images(shards, batch_size=2, lanes=2, prefetch=prefetch, on_bad=lambda bad: None), 3)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("position", [0, 1, 5, 11])
def test_a_stream_from_k_is_the_stream_from_0_advanced(tiny_shards: Callable[..., str], prefetch: int, position: int):
    """Bad samples included, that the first loader met before and the second did not."""
    shards = tiny_shards(SIZES, bad=BAD)
    whole = first(images(shards, prefetch=0, on_bad=lambda bad: None), 15)
    resumed = first(images(shards, prefetch=prefetch, on_bad=lambda bad: None), 15 - position, position)
    assert all(same(a, b) for a, b in zip(whole[position:], resumed, strict=True))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_while_decoding_reaches_the_consumer(tiny_shards: Callable[..., str], prefetch: int):
    def tokenize(captions: list[str]) -> torch.Tensor:
        raise RuntimeError("no such token")

    with pytest.raises(RuntimeError, match="no such token"):
        first(images(tiny_shards(SIZES), prefetch=prefetch, tokenize=tokenize), 1)


def test_a_shard_that_vanishes_stops_the_stream(tiny_shards: Callable[..., str], tmp_path: Path):
    loader = images(tiny_shards(SIZES), prefetch=2)
    for path in (tmp_path / "shards").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"shard \S*\.tar can be used, .*00\d*\.tar cannot be read"):
        first(loader, 1)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_shares_make_the_batch_of_one_rank(tiny_shards: Callable[..., str], ranks: int):
    shards = tiny_shards(SIZES, bad=BAD)
    alone = first(images(shards, on_bad=lambda bad: None), 5)
    shares = [first(images(shards, rank=rank, ranks=ranks, on_bad=lambda bad: None), 5) for rank in range(ranks)]
    for batch, *parts in zip(alone, *shares, strict=True):
        assert torch.equal(batch.pixels, torch.cat([part.pixels for part in parts]))
        assert batch.captions == [caption for part in parts for caption in part.captions]
        assert batch.positions == [position for part in parts for position in part.positions]


def test_any_shows_all_captions_and_best_the_first(tiny_shards: Callable[..., str]):
    shards = tiny_shards([2, 2])
    seen = {
        choice: {c for b in first(images(shards, batch_size=4, lanes=2, captions=choice), 20) for c in b.captions}
        for choice in ("any", "best")
    }
    best = {"0/0", "0/1", "1/0", "1/1"}
    assert seen["best"] == best
    assert seen["any"] == best | {f"{caption} again" for caption in best}


def test_the_tokenizer_gets_the_captions_of_the_batch(tiny_shards: Callable[..., str]):
    def tokenize(captions: list[str]) -> torch.Tensor:
        return torch.tensor([[len(caption), ord(caption[0])] for caption in captions])

    for batch in first(images(tiny_shards(SIZES), tokenize=tokenize), 3):
        assert torch.equal(batch.tensor("tokens"), tokenize(batch.captions))


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_once_visits_each_good_sample_once_in_order(tiny_shards: Callable[..., str], batch_size: int):
    loader = images(tiny_shards(SIZES, bad=BAD), on_bad=lambda bad: None)
    batches = list(loader.once(batch_size))
    everything = [(shard, index) for shard, size in enumerate(SIZES) for index in range(size)]
    assert [sample for batch in batches for sample in batch.samples] == [s for s in everything if s not in BAD]
    for batch in batches:
        assert batch.captions == [f"{shard}/{index}" for shard, index in batch.samples]
        assert 0 < len(batch.pixels) == len(batch.samples) <= batch_size
        assert [everything[position] for position in batch.positions] == batch.samples


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_the_parts_of_once_are_all_of_it(tiny_shards: Callable[..., str], parts: int):
    """Each rank measures its own batches; where a sample stands does not depend on which are bad elsewhere."""
    loader = images(tiny_shards(SIZES, bad=BAD), on_bad=lambda bad: None)
    found = [list(loader.once(2, part=part, parts=parts)) for part in range(parts)]
    own = [pair for batches in found for batch in batches for pair in zip(batch.positions, batch.samples, strict=True)]
    expected = [pair for batch in loader.once(2) for pair in zip(batch.positions, batch.samples, strict=True)]
    assert sorted(own) == expected
    assert max(len(batches) for batches in found) - min(len(batches) for batches in found) <= 1


def test_a_closed_stream_ends_its_threads(tiny_shards: Callable[..., str]):
    stream = images(tiny_shards(SIZES), prefetch=2).stream()
    next(stream)
    assert any(thread.name.startswith("decode") for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name.startswith("decode") for thread in threading.enumerate())


def test_what_does_not_fit_fails_at_once(tiny_shards: Callable[..., str]):
    shards = tiny_shards(SIZES)
    with pytest.raises(ValueError, match="there are 14 samples"):
        images(shards, lanes=16, batch_size=16)
    with pytest.raises(ValueError, match="expected a multiple of data.lanes"):
        images(shards, batch_size=6)
    with pytest.raises(ValueError, match="expected a multiple of the 3 ranks"):
        images(shards, ranks=3)
    with pytest.raises(DataError, match="no shard matches"):
        images(shards + ".nothing")
    for setting in ({"image_size": 0}, {"batch_size": 0}, {"prefetch": -1}):
        with pytest.raises(ValueError, match="must be at least"):
            images(shards, **setting)  # pyright: ignore[reportArgumentType]


def test_held_out_pictures_come_once_with_their_best_caption(tiny_shards):
    config = HeldOutConfig(shards=(tiny_shards([3, 2]),), batch_size=2)
    data = DataConfig(shards=config.shards, image_size=4, captions="any")
    reader = ImageCaptionReader(data, seed=0, tokenize=lambda texts: torch.tensor([len(t) for t in texts]))
    batches = list(held_out(config, image_size=4, reader=reader).once(2))
    assert [len(batch.captions) for batch in batches] == [2, 2, 1]
    assert [caption for batch in batches for caption in batch.captions] == ["0/0", "0/1", "0/2", "1/0", "1/1"]
    assert batches[0].pixels.shape == (2, 3, 4, 4)
    assert batches[0].tensor("tokens").tolist() == [3, 3]
    with pytest.raises(ValueError, match="validation.batch_size must be at least 1"):
        HeldOutConfig(shards=("x",), batch_size=0)


def test_held_out_pictures_of_which_none_can_be_used_are_an_error(tiny_shards: Callable[..., str]):
    loader = images(tiny_shards([2], bad=[(0, 0), (0, 1)]), batch_size=2, lanes=1, on_bad=lambda bad: None)
    with pytest.raises(DataError, match="none of the 2 samples of .* can be used"):
        list(loader.once(2))


# --- keys, parts ---


def test_keys_name_each_sample_for_people(tiny_shards: Callable[..., str]):
    for batch in first(images(tiny_shards(SIZES)), 4):
        assert batch.keys == [f"{shard:05d}.tar:{shard:05d}{index:04d}" for shard, index in batch.samples]


def test_a_batch_is_split_into_equal_parts_that_follow_one_another(tiny_shards: Callable[..., str]):
    def tokenize(captions: list[str]) -> torch.Tensor:
        return torch.tensor([[ord(character) for character in caption[:3]] for caption in captions])

    whole = images(tiny_shards(SIZES), tokenize=tokenize).batch(3)
    for parts in (1, 2, 4, 8):
        found = whole.split(parts)
        assert [len(part.pixels) for part in found] == [8 // parts] * parts
        assert torch.equal(torch.cat([part.pixels for part in found]), whole.pixels)
        assert torch.equal(torch.cat([part.tensor("tokens") for part in found]), whole.tensor("tokens"))
        for name in ("captions", "positions", "samples", "keys"):
            assert [value for part in found for value in getattr(part, name)] == getattr(whole, name)
    for parts in (0, 3, 16):
        with pytest.raises(ValueError, match=f"a batch of 8 cannot be split into {parts} equal parts"):
            whole.split(parts)


def test_a_reader_makes_the_columns(tiny_shards: Callable[..., str]):
    """Of its own, whatever they are, in training and in measuring."""

    class Sizes:
        def read(self, raw: RawSample) -> dict[str, int]:
            return {"size": len(raw.members["png"])}

        def collate(self, samples, positions):
            sizes = torch.tensor([sample["size"] for sample in samples])
            return {"sizes": sizes, "in_a_run": [positions is not None] * len(samples)}

    loader = images(tiny_shards(SIZES), reader=Sizes())
    for batch, in_a_run in ((loader.batch(0), True), (next(loader.once(8)), False)):
        assert batch.columns.keys() == {"sizes", "in_a_run"} and batch.columns["in_a_run"] == [in_a_run] * 8
        assert batch.tensor("sizes").shape == (8,) and len(batch.split(2)[1].tensor("sizes")) == 4


def test_what_shards_hold_is_known_by_their_manifests_wherever_they_lie(
    tiny_shards: Callable[..., str], tmp_path: Path
):
    pattern = tiny_shards(SIZES)
    folder = Path(pattern).parent
    counted = images(pattern).fingerprint
    assert (counted["shards"], counted["samples"], counted["contents"]) == (4, 14, None)
    write_manifest([str(folder)])
    here = images(pattern).fingerprint
    assert here["contents"] is not None and here | {"contents": None} == counted
    shutil.copytree(folder, tmp_path / "moved")
    assert images(str(tmp_path / "moved" / Path(pattern).name)).fingerprint == here
    (tmp_path / "moved").rename(tmp_path / "plain")
    folder.rename(tmp_path / "before")
    other = tiny_shards(SIZES, suffix=".tar.gz")  # as many samples of the same, in other files
    write_manifest([str(Path(other).parent)])
    assert images(other).fingerprint["sha256"] == here["sha256"]
    assert images(other).fingerprint["contents"] not in (None, here["contents"])
