"""Places of shards: what a pattern names, what is allowed, and what is said where a package is missing."""

from __future__ import annotations

import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.registry import _registry as used_protocols

from data.sources import Source, expand
from ldm.errors import DataError


def locations(patterns: str | list[str], *, allow_pipe: bool = False) -> list[str]:
    return [source.location for source in expand(patterns, allow_pipe=allow_pipe)]


def test_a_pattern_without_a_match_says_what_the_folder_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.zip").touch()
    with pytest.raises(DataError, match=rf"no shard matches .*: {tmp_path} holds 1 \.zip: give paths of \.tar files"):
        expand(f"{tmp_path}/*.tar")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"the current folder holds 1 \.zip: give"):
        expand("*.tar")
    with pytest.raises(DataError, match=r"'nowhere/\*\.tar'\): give paths of \.tar files"):
        expand("nowhere/*.tar")


def test_urls_and_pipes_have_brace_ranges_in_the_order_given():
    assert locations("https://x.org/a/{00001,00000}.tar") == ["https://x.org/a/00001.tar", "https://x.org/a/00000.tar"]
    assert locations(["memory://b/{0..1}.tar", "memory://a/7.tar"]) == [
        "memory://b/0.tar",
        "memory://b/1.tar",
        "memory://a/7.tar",
    ]
    assert locations("pipe:cat {0..1}.tar", allow_pipe=True) == ["pipe:cat 0.tar", "pipe:cat 1.tar"]


@pytest.mark.parametrize("pattern", ["pipe:cat x.tar", "{pipe:cat x,y}.tar"])
def test_a_command_is_run_only_where_that_is_allowed(pattern: str):
    """However it is written: a brace may make one."""
    with pytest.raises(ValueError, match=r"a pipe \(x.tar\) runs a shell command: set data.allow_pipe=true"):
        expand(pattern)


def test_globs_of_urls_are_listed_by_their_protocol():
    files = fsspec.filesystem("memory")
    for name in ("00001.tar", "00000.tar", "readme.txt"):
        files.pipe_file(f"/globbed/{name}", b"")
    found = locations("memory://globbed/*.tar")
    assert [Source(location).name for location in found] == ["00000.tar", "00001.tar"]
    assert all(location.startswith("memory://") for location in found)
    with pytest.raises(DataError, match="no shard matches 'memory://globbed/x"):
        expand("memory://globbed/x*.tar")


def test_a_question_mark_on_the_web_begins_the_query():
    assert locations("https://x.org/0.tar?key=1") == ["https://x.org/0.tar?key=1"]


@pytest.mark.parametrize(
    ("location", "name", "shown", "beside"),
    [
        ("/d/0.tar", "0.tar", "/d/0.tar", "/d/m"),
        ("0.tar", "0.tar", "0.tar", "m"),
        ("s3://bucket/d/0#1.tar", "0#1.tar", "s3://bucket/d/0#1.tar", "s3://bucket/d/m"),
        ("s3://bucket/0.tar", "0.tar", "s3://bucket/0.tar", "s3://bucket/m"),
        (
            "https://me:secret@x.org:8/d/0.tar?key=secret",
            "0.tar",
            "https://x.org:8/d/0.tar",
            "https://me:secret@x.org:8/d/m?key=secret",
        ),
        ("pipe:cat /d/0.tar", "pipe:cat /d/0.tar", "a pipe (0.tar)", None),
        ("pipe:ssh -i secret host", "pipe:ssh -i secret host", "a pipe", None),
    ],
)
def test_names_neighbours_and_what_is_shown(location: str, name: str, shown: str, beside: str | None):
    """Nothing secret is shown."""
    source = Source(location)
    assert (source.name, source.shown) == (name, shown)
    assert source.beside("m") == (None if beside is None else Source(beside))


@pytest.mark.parametrize(("url", "package"), [("s3://b/0.tar", "s3fs"), ("http://x/0.tar", "aiohttp")])
def test_a_missing_package_is_named(url: str, package: str, monkeypatch: pytest.MonkeyPatch):
    for protocol in ("s3", "http"):  # what another test has used is remembered
        monkeypatch.delitem(used_protocols, protocol, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "fsspec.implementations.http", None)
    with pytest.raises(ValueError, match=rf"{url[:2]}.*:// needs the package {package}: pip install {package}"):
        expand(url)


def test_an_unknown_protocol_is_named():
    with pytest.raises(ValueError, match="nowhere://x/0.tar: nowhere:// is not a protocol of fsspec"):
        expand("nowhere://x/0.tar")


def test_a_drive_letter_is_no_protocol():
    assert Source("c://x/0.tar").is_local and Source(str(Path("a:b"))).is_local
