"""Manifests: written for shards wherever they are, read wherever they stand, and no shard opened for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from data.fetch import Patience
from data.manifest import Entry, entries_for, entry_of, main
from data.sources import Source, expand
from ldm.errors import DataError

QUICK = Patience(tries=2, timeout=1.0, pause=0.01)


@pytest.fixture
def folder(tiny_shards: Callable[..., str]) -> Path:
    return Path(tiny_shards([3, 2])).parent


def test_the_command_writes_beside_the_shards(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/manifest.json: 2 shards, 5 samples\n"
    expected = {path.name: entry_of(path) for path in sorted(folder.glob("*.tar"))}
    assert [entry.count for entry in expected.values()] == [3, 2]
    found = json.loads((folder / "manifest.json").read_text())
    assert {name: Entry(**value) for name, value in found.items()} == expected
    assert entries_for(expand(str(folder / "*.tar"))) == list(expected.values())


def test_the_command_takes_patterns_of_several_folders(folder: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    (folder / "00001.tar").rename(tmp_path / "other" / "00001.tar")
    assert main([f"{tmp_path}/{{shards,other}}/*.tar"]) == 0
    assert list(json.loads((tmp_path / "other" / "manifest.json").read_text())) == ["00001.tar"]
    assert list(json.loads((folder / "manifest.json").read_text())) == ["00000.tar"]


def test_pipes_and_urls_are_listed_in_a_file_of_their_own(folder: Path, tmp_path: Path):
    fsspec.filesystem("memory").pipe_file("/listed/0.tar", (folder / "00001.tar").read_bytes())
    places = [f"pipe:cat {folder}/00000.tar", "memory://listed/0.tar"]
    out = tmp_path / "manifest.json"
    assert main([*places, "--out", str(out)]) == 0
    entries = entries_for([Source(place) for place in places], manifest=str(out))
    assert entries == [entry_of(folder / "00000.tar"), entry_of(folder / "00001.tar")]
    assert entries_for([Source(places[0])]) == [None]  # beside a pipe nothing stands


def test_the_command_says_where_to_write_what_has_no_folder(capsys: pytest.CaptureFixture[str]):
    assert main(["pipe:cat x"]) == 2
    assert "error: no file can be written next to a pipe: give --out FILE" in capsys.readouterr().err


def test_a_shard_that_is_not_whole_is_named_and_left_out(folder: Path, capsys: pytest.CaptureFixture[str]):
    path = folder / "00000.tar"
    path.write_bytes(path.read_bytes()[:2000])
    assert main([str(folder)]) == 3
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(path) in error and "copy it again" in error
    assert list(json.loads((folder / "manifest.json").read_text())) == ["00001.tar"]


def test_a_folder_without_shards_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(tmp_path)]) == 3
    assert "without .tar files (nothing)" in capsys.readouterr().err


def test_a_sizes_json_counts_where_no_manifest_does(folder: Path):
    (folder / "sizes.json").write_text('{"00000.tar": 7, "00001.tar": 8}')
    (folder / "manifest.json").write_text('{"00001.tar": {"count": 2, "size": 9, "sha256": null}}')
    assert entries_for(expand(str(folder / "*.tar"))) == [Entry(7), Entry(2, 9, None)]


def test_a_manifest_is_found_beside_a_url():
    fsspec.filesystem("memory").pipe_file("/beside/manifest.json", b'{"0.tar": {"count": 5}}')
    assert entries_for(expand("memory://beside/{0,1}.tar"), patience=QUICK) == [Entry(5), None]


@pytest.mark.parametrize(
    "content",
    [
        "{cut",
        "[2]",
        '{"00000.tar": "3"}',
        '{"00000.tar": true}',
        '{"00000.tar": -1}',
        '{"00000.tar": {"count": 1.5}}',
        '{"00000.tar": {"size": 3}}',
        '{"00000.tar": {"count": 3, "md5": "x"}}',
        '{"00000.tar": {"count": 3, "sha256": 7}}',
        "[" * 100_000,
    ],
)
@pytest.mark.parametrize("name", ["manifest.json", "sizes.json"])
def test_what_is_no_manifest_is_named(folder: Path, name: str, content: str):
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=f"{folder / name} is not a JSON object of shards .*python -m data.manifest"):
        entries_for(expand(str(folder / "*.tar")))


def test_a_manifest_that_is_named_must_exist(folder: Path):
    with pytest.raises(
        DataError, match="data.manifest: nowhere.json is missing: write it with python -m data.manifest"
    ):
        entries_for(expand(str(folder / "*.tar")), manifest="nowhere.json")
