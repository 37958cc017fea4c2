"""Shards are opened once, where they are reached; what is not as its manifest says is told of, yet read."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.serving import served, until

from data.config import DataConfig
from data.fetch import Patience
from data.manifest import main as write_manifest
from data.shards import Shard
from data.sources import expand
from data.store import ShardStore
from ldm.errors import DataError

QUICK = Patience(tries=3, timeout=1.0, pause=0.01)


@pytest.fixture
def folder(tiny_shards: Callable[..., str]) -> Path:
    folder = Path(tiny_shards([3, 2, 4, 1])).parent
    write_manifest([str(folder)])
    return folder


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are opened, in turn."""
    found: list[str] = []
    original = Shard.__init__

    def init(self: Shard, path: Path, *, name: str | None = None, **more: Any) -> None:
        found.append((name or str(path)).rpartition("/")[2])
        original(self, path, name=name, **more)

    monkeypatch.setattr(Shard, "__init__", init)
    return found


def store(pattern: str, *, keep: int = 9, told: list[str] | None = None, cache: Path | None = None) -> ShardStore:
    config = DataConfig(shards=(pattern,), cache=None if cache is None else str(cache))
    on_damage = (told if told is not None else []).append
    return ShardStore(expand(pattern), config, keep=keep, keep_copies=keep, on_damage=on_damage, patience=QUICK)


def test_counted_shards_are_opened_when_they_are_asked_for(folder: Path, opened: list[str]):
    shards = store(f"{folder}/*.tar")
    assert shards.sizes == [3, 2, 4, 1] and opened == []
    assert [shards[2].key(0), shards[2].key(3), shards[0].key(0)] == ["000020000", "000020003", "000000000"]
    assert opened == ["00002.tar", "00000.tar"]


def test_shards_that_nothing_counts_are_opened_at_once(folder: Path, opened: list[str]):
    (folder / "manifest.json").unlink()
    shards = store(f"{folder}/*.tar", keep=2)
    assert shards.sizes == [3, 2, 4, 1] and len(opened) == 4
    assert shards[3].key(0) == "000030000" and len(opened) == 4  # of the last kept
    assert shards[0].key(0) == "000000000" and len(opened) == 5


def test_the_last_used_shards_stay_open(folder: Path, opened: list[str]):
    shards = store(f"{folder}/*.tar", keep=2)
    for number in (0, 1, 0, 2, 0, 1):
        assert len(shards[number]) == shards.sizes[number]
    assert opened == ["00000.tar", "00001.tar", "00002.tar", "00001.tar"]


def test_threads_that_ask_at_once_open_it_once(folder: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch):
    import data.store

    def slow(path: Path, entry: object) -> str:
        time.sleep(0.05)
        return ""

    monkeypatch.setattr(data.store, "mismatch", slow)
    shards = store(f"{folder}/*.tar")
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(shards[0]))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [3] * 6 and opened == ["00000.tar"]


def test_the_next_is_made_ready_in_the_background(folder: Path, opened: list[str]):
    shards = store(f"{folder}/*.tar")
    shards.make_ready(1)
    until(lambda: opened == ["00001.tar"])
    assert len(shards[1]) == 2 and opened == ["00001.tar"]


def test_what_failed_in_the_background_is_tried_again_when_it_is_needed(tmp_path: Path, folder: Path):
    with served(folder) as site:
        shards = store(f"{site.url}/0000{{0..3}}.tar")
        site.faults["00001.tar"] = ["error"] * 3
        shards.make_ready(1)
        until(lambda: site.count("00001.tar") == 3 and not shards._open)
        assert len(shards[1]) == 2


def test_a_shard_that_cannot_be_read_is_asked_for_no_more(folder: Path):
    with served(folder) as site:
        shards = store(f"{site.url}/0000{{0..3}}.tar")
        site.faults["00001.tar"] = ["error"] * 9
        for _ in range(3):
            with pytest.raises(DataError, match=r"00001\.tar cannot be read, in 3 tries"):
                shards[1]
        assert site.count("00001.tar") == 3 and len(shards[0]) == 3


def test_damage_is_told_once_and_the_rest_is_read(folder: Path):
    content = bytearray((folder / "00000.tar").read_bytes())
    content[content.index(b"0/1 again")] = ord("7")
    (folder / "00000.tar").write_bytes(content)
    told: list[str] = []
    shards = store(f"{folder}/*.tar", keep=1, told=told)
    for number in (0, 1, 0, 1):
        assert len(shards[number]) == shards.sizes[number]
    assert told == [f"shard {folder}/00000.tar: its sha256 differs from the manifest's"]
    assert shards.present(0) == 3


def test_another_size_is_told(folder: Path):
    path = folder / "00000.tar"
    path.write_bytes(path.read_bytes()[:4000])
    told: list[str] = []
    shards = store(f"{folder}/*.tar", told=told)
    assert shards.present(0) == 2  # of the second only the picture
    assert len(told) == 1 and "it has 4,000 bytes, the manifest says 10,240; truncated" in told[0]


def test_a_shard_is_read_wherever_its_manifest_stands(folder: Path, tmp_path: Path):
    local = store(f"{folder}/*.tar")
    with served(folder) as site:
        remote = store(f"{site.url}/0000{{0..3}}.tar", cache=tmp_path / "cache")
        assert remote.sizes == local.sizes
        for number, size in enumerate(local.sizes):
            for index in range(size):
                assert remote.read(number, index).members == local.read(number, index).members
        again = store(f"{site.url}/0000{{0..3}}.tar", cache=tmp_path / "cache")
        assert again.read(2, 1).key == "000020001"
        assert [site.count(f"0000{number}.tar") for number in range(4)] == [1] * 4


def test_what_was_altered_on_its_way_is_copied_again(folder: Path):
    with served(folder) as site:
        told: list[str] = []
        shards = store(f"{site.url}/0000{{0..3}}.tar", told=told)
        site.faults["00001.tar"] = ["altered", "altered"]
        assert len(shards[1]) == 2 and told == [] and site.count("00001.tar") == 3
        site.faults["00002.tar"] = ["altered"] * 3
        assert shards.present(2) == 4
        assert told == [f"shard {site.url}/00002.tar: its sha256 differs from the manifest's"]


def test_a_copy_that_was_removed_is_made_again(folder: Path, tmp_path: Path):
    with served(folder) as site:
        shards = store(f"{site.url}/0000{{0..3}}.tar", cache=tmp_path / "cache")
        assert shards.read(0, 0).key == "000000000"
        for path in (tmp_path / "cache").iterdir():
            path.unlink()
        assert shards.read(0, 1).key == "000000001"


def test_remote_shards_that_nothing_counts_are_an_error_with_the_command(folder: Path):
    (folder / "manifest.json").unlink()
    with served(folder) as site, pytest.raises(DataError, match=r"is unknown: run python -m data.manifest"):
        store(f"{site.url}/0000{{0..3}}.tar")


def test_shards_are_known_by_their_own_folder(folder: Path, tmp_path: Path):
    """The same name in two folders is two shards, each with the count of its own manifest."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "00000.tar").write_bytes((folder / "00001.tar").read_bytes())
    (tmp_path / "other" / "manifest.json").write_text(json.dumps({"00000.tar": {"count": 2}}))
    assert store(f"{tmp_path}/{{shards,other}}/00000.tar").sizes == [3, 2]
