"""Every reader of shards makes the same of each shard of the zoo: training, validation and the manifest."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
from helpers.shard_zoo import ZOO, Odd, Rejected, jpg

from data.bad_samples import BadSample
from data.config import DataConfig, HeldOutConfig, SampleConfig
from data.loader import CaptionedImages, held_out
from data.manifest import main as write_manifest
from ldm.errors import DataError

EVERY_SHARD = pytest.mark.parametrize("name", ZOO)
# Those whose settings leave the sound shard readable.
BESIDE_A_SOUND_ONE = [name for name, odd in ZOO.items() if not odd.refused and "_keys" not in str(odd.settings)]


@pytest.fixture
def made(tmp_path: Path) -> Callable[[Odd], Path]:
    def make(odd: Odd) -> Path:
        path = tmp_path / odd.name
        if odd.content is None:
            path.mkdir()
            (path / "a.png").write_bytes(jpg())
            (path / "a.txt").write_text("a cat")
        else:
            path.write_bytes(odd.content())
        return path

    return make


def check(images: CaptionedImages, bad: list[BadSample], odd: Odd, found: dict[str, str]) -> None:
    delivered = {key: caption for key, caption in odd.samples.items() if isinstance(caption, str)}
    assert found == delivered
    reasons = {one.key: one.reason for one in bad}
    rejected = {key: one.reason for key, one in odd.samples.items() if isinstance(one, Rejected)}
    assert reasons.keys() == rejected.keys()
    for key, reason in rejected.items():
        assert re.search(reason, reasons[key]), reasons[key]
    assert len(images) == len(odd.samples)


def keys_and_captions(batch) -> dict[str, str]:
    return {key.partition(":")[2]: caption for key, caption in zip(batch.keys, batch.captions, strict=True)}


def test_the_zoo_is_large():
    assert len(ZOO) >= 40 and sum(bool(odd.refused) for odd in ZOO.values()) >= 10


@EVERY_SHARD
@pytest.mark.parametrize("part", ["training", "validation"])
def test_what_is_delivered_and_what_is_rejected(made: Callable[[Odd], Path], name: str, part: str):
    odd, bad = ZOO[name], list[BadSample]()
    path = made(odd)
    samples = SampleConfig(**odd.settings)

    def read() -> None:
        if part == "training":
            config = DataConfig(
                shards=str(path), image_size=8, batch_size=1, captions="best", max_bad_fraction=1.0, **odd.settings
            )
            images = CaptionedImages(config, seed=0, on_bad=bad.append)
            usable = [one for one in odd.samples.values() if isinstance(one, str)]
            batches = islice(images.stream(), len(odd.samples)) if usable else images.once(1)
        else:
            images = held_out(HeldOutConfig(shards=str(path)), image_size=8, samples=samples)
            images.on_bad, batches = bad.append, images.once(4)
        found: dict[str, str] = {}
        try:
            for batch in batches:
                found |= keys_and_captions(batch)
        except DataError as error:
            assert not found and "can be used" in str(error)
        check(images, bad, odd, found)

    if odd.refused or odd.empty:
        with pytest.raises(DataError, match=odd.refused or "holds a sample: give others") as caught:
            read()
        assert odd.empty or str(path) in str(caught.value)
    else:
        read()


@EVERY_SHARD
def test_what_the_manifest_says(made: Callable[[Odd], Path], name: str, capsys: pytest.CaptureFixture[str]):
    odd = ZOO[name]
    path = made(odd)
    code = write_manifest([str(path)])
    told = capsys.readouterr().err
    if odd.refused:
        assert code == 3 and re.search(odd.refused, told) and str(path) in told
        return
    assert code == 0
    assert json.loads((path.parent / "manifest.json").read_text())[path.name]["count"] == len(odd.samples)
    assert ("holds no samples" in told) == odd.empty


@pytest.mark.parametrize("name", BESIDE_A_SOUND_ONE)
def test_beside_a_sound_shard_it_costs_no_sample_of_that(made: Callable[[Odd], Path], name: str, tmp_path: Path):
    odd = ZOO[name]
    sound = tmp_path / "sound"
    sound.mkdir()
    content = ZOO["sound"].content
    assert content is not None
    (sound / "y.tar").write_bytes(content())
    shards = (str(made(odd)), f"{sound}/*.tar")
    config = DataConfig(
        shards=shards, image_size=8, batch_size=1, captions="best", max_bad_fraction=1.0, **odd.settings
    )
    images = CaptionedImages(config, seed=0, on_bad=lambda bad: None)
    usable = sum(isinstance(one, str) for one in odd.samples.values())
    batches = list(islice(images.stream(), len(odd.samples) + 2))
    assert len({key for batch in batches for key in batch.keys}) == usable + 2
