"""Writing shards: img2dataset's layout, the same bytes every time, readable by webdataset."""

from __future__ import annotations

import json
import tarfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from webdataset.compat import WebDataset

from data.shards import Shard
from data.sources import expand
from data.write import KEY_DIGITS_IN_SHARD, write_shards

SAMPLES: list[tuple[bytes, str, dict[str, Any]]] = [
    (f"picture {number}".encode(), f"caption {number} é", {"caption": f"caption {number} é", "code": number})
    for number in range(7)
]


def test_the_layout_is_that_of_img2dataset(tmp_path: Path):
    write_shards(SAMPLES, tmp_path, shards=3)
    names = [
        "00000.tar.gz",
        "00000_stats.json",
        "00001.tar.gz",
        "00001_stats.json",
        "00002.tar.gz",
        "00002_stats.json",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *names,
        "manifest.json",
        "sizes.json",
    ]  # and nothing partial
    sizes = {"00000.tar.gz": 3, "00001.tar.gz": 2, "00002.tar.gz": 2}
    assert json.loads((tmp_path / "sizes.json").read_text()) == sizes
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert {name: entry["count"] for name, entry in manifest.items()} == sizes
    for name, entry in manifest.items():
        content = (tmp_path / name).read_bytes()
        assert (entry["size"], entry["sha256"]) == (len(content), sha256(content).hexdigest())
    stats = json.loads((tmp_path / "00001_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]) == (2, 2, {"success": 2})
    with tarfile.open(tmp_path / "00001.tar.gz") as tar:
        assert tar.getnames() == [f"00001000{i}.{e}" for i in range(2) for e in ("json", "txt", "webp")]


def test_what_is_written_is_read(tmp_path: Path):
    write_shards(SAMPLES, tmp_path, shards=3)
    shards = [Shard(Path(source.location)) for source in expand(str(tmp_path / "*.tar.gz"))]
    read = {}
    for shard in shards:
        for index in range(len(shard)):
            members = shard[index].members
            record = json.loads(members["json"])
            assert record.pop("key") == shard[index].key and record.pop("status") == "success"
            read[record["code"]] = (members["webp"], members["txt"].decode(), record)
    assert [read[number] for number in range(7)] == SAMPLES


def test_webdataset_reads_the_same(tmp_path: Path):
    write_shards(SAMPLES, tmp_path, shards=2)
    paths = [Path(source.location) for source in expand(str(tmp_path / "{00000..00001}.tar.gz"))]
    ours = [(raw.key, raw.members) for path in paths for raw in map(Shard(path).__getitem__, range(len(Shard(path))))]
    theirs = WebDataset([str(path) for path in paths], shardshuffle=False)
    assert ours == [(s["__key__"], {k: s[k] for k in ("webp", "txt", "json")}) for s in theirs]
    assert len(ours) == 7


def test_two_writings_give_the_same_bytes(tmp_path: Path):
    for name in ("a", "b"):
        write_shards(SAMPLES, tmp_path / name, shards=2)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_nobody_and_no_time_stand_in_the_tar(tmp_path: Path):
    write_shards(SAMPLES, tmp_path, shards=1)
    with tarfile.open(tmp_path / "00000.tar.gz") as tar:
        assert {(member.mtime, member.uname, member.gname) for member in tar} == {(0, "nobody", "nobody")}
    assert (tmp_path / "00000.tar.gz").read_bytes()[4:8] == bytes(4)  # gzip's own time


def test_shards_that_would_be_empty_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="7 samples cannot fill 8 shards"):
        write_shards(SAMPLES, tmp_path / "x", shards=8)
    with pytest.raises(ValueError, match="0 shards"):
        write_shards(SAMPLES, tmp_path / "x", shards=0)
    assert not (tmp_path / "x").exists()


def test_more_samples_than_keys_are_refused(tmp_path: Path):
    samples = [SAMPLES[0]] * (10**KEY_DIGITS_IN_SHARD * 2 + 1)
    with pytest.raises(ValueError, match="10001 samples per shard are more than 10000"):
        write_shards(samples, tmp_path / "x", shards=2)
    assert not (tmp_path / "x").exists()
