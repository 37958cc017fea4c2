"""Which captions are drawn, what of a usable sample is reported, and which captions are cut."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.loading import first, images
from helpers.shard_zoo import jpg, packed

from data.bad_samples import BadSample, Quarantine
from data.config import DataConfig
from data.remarks import MOST_LISTED, MOST_MEASURED, CutCaptions, Remarks


@pytest.fixture
def shard(tmp_path: Path) -> Callable[..., str]:
    def write(**members: bytes) -> str:
        """Eight samples, each with a picture and these members."""
        named = [
            (f"{number}.{ending}", content)
            for number in range(8)
            for ending, content in ({"jpg": jpg()} | members).items()
        ]
        (tmp_path / "x.tar").write_bytes(packed(*named))
        return str(tmp_path / "x.tar")

    return write


def test_each_line_is_drawn_if_asked_by_position_alone(shard: Callable[..., str]):
    path = shard(txt=b"a cat\n\na tabby\n  one cat \n")
    settings = {"lanes": 1, "batch_size": 8, "caption_lines": "separate"}
    drawn = [caption for batch in first(images(path, **settings), 30) for caption in batch.captions]
    assert Counter(drawn).keys() == {"a cat", "a tabby", "one cat"} and min(Counter(drawn).values()) > 50
    resumed = [caption for batch in first(images(path, **settings), 10, position=20) for caption in batch.captions]
    shared = [images(path, rank=rank, ranks=2, **settings).batch(25).captions for rank in range(2)]
    assert drawn[160:] == resumed and sum(shared, []) == drawn[200:208]
    best = images(path, **settings, captions="best").batch(0).captions
    assert best == ["a cat"] * 8
    joined = images(path, lanes=1, batch_size=8).batch(0).captions
    assert joined == ["a cat  a tabby   one cat"] * 8


def test_languages_are_several_captions_in_the_order_asked(shard: Callable[..., str]):
    path = shard(json=json.dumps({"captions": {"en": ["a cat", "a tabby"], "de": "Katze"}}).encode())
    keys = ("json.captions.de", "captions.en")
    both = images(path, lanes=1, caption_keys=keys)
    assert {caption for batch in first(both, 30) for caption in batch.captions} == {"Katze", "a cat", "a tabby"}
    assert set(images(path, lanes=1, caption_keys=keys, captions="best").batch(0).captions) == {"Katze"}


def test_what_is_not_used_is_told_once_and_listed(
    shard: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    listing = Quarantine(tmp_path / "remarks.jsonl")
    loader = images(shard(txt=b"a cat", json=b"{broken"), lanes=1, remarks=listing)
    first(loader, 4)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("remark: ") and "its json does not parse (" in line
    assert line.endswith(f"the rest of the sample is used; {listing.path} lists others")
    assert len(listing.path.read_text().splitlines()) == 8 and loader.bad_samples == {}


def test_each_kind_of_remark_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    told: list[str] = []
    remarks = Remarks(Quarantine(tmp_path / "x.jsonl"), told.append)
    for number in range(MOST_LISTED + 50):
        remarks.add(BadSample("x.tar", str(number), f"odd (number {number})"))
        remarks.add(BadSample("x.tar", str(number), "other"))
    assert [line.partition(":")[0] for line in told] == ["0 in x.tar", "0 in x.tar"]
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == MOST_LISTED


def test_a_name_that_no_sample_has_is_told_once(shard: Callable[..., str], capsys: pytest.CaptureFixture[str]):
    """It is no silent choice of the next one."""
    path = shard(txt=b"a cat", json=b'{"caption_de": "Katze"}')
    keys = {"caption_keys": ("json.caption_ed", "json.caption_de", "txt"), "image_keys": ("jgp", ".JPG")}
    loader = images(path, lanes=1, **keys)
    first(loader, 3)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("remark: none of the first 8 samples has jgp, json.caption_ed, which data.image_keys or ")
    first(images(path, lanes=1, caption_keys=("json.caption_de", "txt", "json.caption")), 3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("keys", [(), ("",), (".",), ("a/b",)])
def test_keys_are_names(keys: tuple[str, ...]):
    with pytest.raises(ValueError, match=r"data\.caption_keys"):
        DataConfig(shards="x.tar", caption_keys=keys)
    if keys:
        with pytest.raises(ValueError, match=r"data\.image_keys"):
            DataConfig(shards="x.tar", image_keys=keys)


def test_captions_that_an_encoder_cuts_are_counted_once_each(shard: Callable[..., str]):
    loader = images(shard(txt=b"one two three"), lanes=1, batch_size=3)
    loader.count_cut(lambda caption: caption[7:], tokens=2)
    first(loader, 9)
    assert loader.cut_captions is not None
    assert (loader.cut_captions.measured, loader.cut_captions.cut) == (8, 8)
    cut = CutCaptions(lambda caption: caption[1:], tokens=1)
    for _ in range(MOST_MEASURED):
        cut.measure(["a", "ab", "abc"])
    assert cut.measured == MOST_MEASURED and cut.cut == MOST_MEASURED * 2 // 3


def test_measuring_ends_with_the_ten_thousandth():
    asked: list[str] = []
    cut = CutCaptions(lambda caption: asked.append(caption) or "", tokens=1, most=5)
    for _ in range(4):
        cut.measure(["a", "b", "c"])
    assert len(asked) == 5 == cut.measured
