"""Copies of remote shards: whole or not at all, with tries, without hanging, within bounds."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from helpers.serving import Site, served

from data.fetch import Absent, Cache, Patience, read_text
from data.sources import Source
from ldm.errors import DataError

QUICK = Patience(tries=3, timeout=1.0, pause=0.01)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "site").mkdir()
    for number in range(4):
        (tmp_path / "site" / f"{number}.tar").write_bytes(bytes([number]) * 40_000)
    with served(tmp_path / "site") as site:
        yield site


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", most=10**9, keep=1, patience=QUICK)


def files(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir())


def test_a_copy_is_made_once(site: Site, cache: Cache):
    source = Source(f"{site.url}/1.tar")
    for _ in range(3):
        assert cache.get(source, 40_000).read_bytes() == bytes([1]) * 40_000
    assert site.count("1.tar") == 1
    cache.drop(source)
    assert cache.get(source).exists() and site.count("1.tar") == 2


def test_places_that_differ_in_the_query_alone_have_copies_of_their_own(site: Site, cache: Cache):
    paths = {cache.get(Source(f"{site.url}/1.tar{query}")) for query in ("", "?a", "?b")}
    assert len(paths) == 3


@pytest.mark.parametrize("fault", ["error", "short", "stuck"])
def test_what_fails_twice_is_tried_a_third_time(site: Site, cache: Cache, fault: str):
    site.faults["1.tar"] = [fault, fault]
    assert cache.get(Source(f"{site.url}/1.tar")).stat().st_size == 40_000
    assert site.count("1.tar") == 3
    assert len(files(cache)) == 1  # nothing partial


@pytest.mark.parametrize("fault", ["error", "short", "stuck"])
def test_after_three_tries_the_place_is_named(site: Site, cache: Cache, fault: str):
    site.faults["1.tar"] = [fault] * 9
    began = time.monotonic()
    with pytest.raises(
        DataError, match=rf"{site.url}/1\.tar cannot be read, in 3 tries \(.+\): check that it can be reached"
    ):
        cache.get(Source(f"{site.url}/1.tar"))
    assert site.count("1.tar") == 3 and files(cache) == []
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("name", ["1.tar", "9.tar"])
def test_no_error_quotes_what_is_secret(site: Site, cache: Cache, name: str):
    """As the key of a signed URL, or a password."""
    site.faults["1.tar"] = ["error"] * 3
    host = site.url.removeprefix("http://")
    with pytest.raises((DataError, Absent)) as caught:
        cache.get(Source(f"http://me:hush@{host}/{name}?key=secret"))
    assert name in str(caught.value) and not re.search("secret|hush", str(caught.value))


def test_a_copy_of_another_size_is_a_failed_try(site: Site, cache: Cache):
    with pytest.raises(DataError, match=r"40,000 bytes received, expected 40,001"):
        cache.get(Source(f"{site.url}/1.tar"), 40_001)
    assert site.count("1.tar") == 3


def test_what_is_not_there_is_not_tried_again(site: Site, cache: Cache):
    with pytest.raises(Absent):
        cache.get(Source(f"{site.url}/9.tar"))
    assert site.count("9.tar") == 1
    assert read_text(Source(f"{site.url}/manifest.json"), QUICK) is None


def test_any_protocol_of_fsspec_is_copied(cache: Cache):
    fsspec.filesystem("memory").pipe_file("/fetched/0.tar", b"content")
    assert cache.get(Source("memory://fetched/0.tar")).read_bytes() == b"content"
    assert read_text(Source("memory://fetched/0.tar"), QUICK) == "content"
    assert read_text(Source("memory://fetched/1.tar"), QUICK) is None


def test_the_longest_unused_copies_make_room(site: Site, tmp_path: Path):
    """But never the last used ones, and nothing that is no copy of a shard."""
    cache = Cache(tmp_path / "cache", most=90_000, keep=2, patience=QUICK)
    (cache.folder / "notes.txt").write_bytes(bytes(10**6))
    paths = [cache.get(Source(f"{site.url}/{number}.tar")) for number in range(2)]
    for age, path in zip((300, 200), paths, strict=True):
        os.utime(path, (time.time() - age, time.time() - age))
    cache.get(Source(f"{site.url}/0.tar"))  # now the last used
    third = cache.get(Source(f"{site.url}/2.tar"))
    assert files(cache) == sorted([paths[0].name, third.name, "notes.txt"])
    small = Cache(tmp_path / "cache", most=1, keep=2, patience=QUICK)
    small.get(Source(f"{site.url}/3.tar"))
    assert len(files(cache)) == 3


def test_a_temporary_folder_is_removed_at_the_end(site: Site):
    cache = Cache(None, most=10**9, keep=1, patience=QUICK)
    folder = cache.folder
    assert cache.get(Source(f"{site.url}/0.tar")).parent == folder
    del cache
    assert not folder.exists()


def test_what_killed_processes_left_is_removed_but_not_what_is_being_written(tmp_path: Path):
    def being_written(letter: str) -> str:
        return f".{letter * 64}.shard.{'0' * 32}.partial"

    others = ["film.mkv.partial", "old.txt"]  # of the folder's owner
    for name, age in ((being_written("a"), 7200), (being_written("b"), 60), *((name, 7200) for name in others)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    assert files(Cache(tmp_path, most=1, keep=1)) == [being_written("b"), *others]


def test_a_pipe_is_what_its_command_writes(cache: Cache, tmp_path: Path):
    assert cache.get(Source("pipe:printf 'a b' | tr a c")).read_bytes() == b"c b"


def test_a_command_that_fails_is_a_failed_try(cache: Cache, tmp_path: Path):
    command = f"echo x >> {tmp_path}/tries; printf half; echo why >&2; exit 3"
    with pytest.raises(DataError, match=r"in 3 tries \(the command ended with code 3: why\)"):
        cache.get(Source(f"pipe:{command}"))
    assert (tmp_path / "tries").read_text() == "x\n" * 3 and files(cache) == []


def test_a_command_that_hangs_is_ended_with_all_that_it_started(cache: Cache, tmp_path: Path):
    """Here the shell and what it waits for."""
    began = time.monotonic()
    with pytest.raises(DataError, match="no data received for 1 s"):
        cache.get(Source(f"pipe:(sleep 60; touch {tmp_path}/late) & echo $! >> {tmp_path}/ids; wait"))
    assert time.monotonic() - began < 20
    for process in (tmp_path / "ids").read_text().split():
        status, patience = Path(f"/proc/{process}/status"), time.monotonic() + 10
        while (running := status.exists() and "zombie" not in status.read_text()) and time.monotonic() < patience:
            time.sleep(0.05)  # A signal reaches a process when it is next scheduled.
        assert not running


def test_threads_that_want_the_same_get_whole_copies(site: Site, cache: Cache):
    found: list[int] = []

    def get() -> None:
        found.append(len(cache.get(Source(f"{site.url}/1.tar")).read_bytes()))

    threads = [threading.Thread(target=get) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [40_000] * 4 and len(files(cache)) == 1
