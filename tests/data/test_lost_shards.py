"""Shards that are missing, empty or oddly named: an error whose remedy works, or a counted loss; never silence."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from helpers.accounts import accounts_of
from helpers.loading import first, images, same

from data.bad_samples import Quarantine
from data.config import DataConfig, HeldOutConfig
from data.loader import CaptionedImages, held_out
from data.manifest import main as write_manifest
from data.sources import expand
from ldm.errors import DataError

SIZES = [3, 5, 2, 4]


@pytest.fixture
def folder(tiny_shards: Callable[..., str]) -> Path:
    return Path(tiny_shards(SIZES)).parent


@pytest.fixture
def counted(folder: Path) -> Path:
    write_manifest([str(folder)])
    return folder


def sizes_json(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    counts = {f"{number:05d}.tar": size for number, size in enumerate(SIZES)}
    (folder / "sizes.json").write_text(json.dumps(counts))


def remedy(error: pytest.ExceptionInfo[DataError]) -> dict[str, Any]:
    """The setting that an error advises."""
    found = re.search(r"set data\.(max_missing_shards)=([\d.]+)$", str(error.value))
    assert found is not None, error.value
    return {found[1]: float(found[2])}


@pytest.mark.parametrize("pattern", ["*.tar", "0000?.tar", "{00000..00003}.tar", "{00000,00001,00002,00003}.tar"])
@pytest.mark.parametrize("only_sizes", [False, True])
def test_a_shard_that_a_manifest_counts_and_that_is_gone_is_an_error_or_a_counted_loss(
    counted: Path, pattern: str, only_sizes: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    pattern = f"{counted}/{pattern}"
    whole = first(images(pattern, lanes=2), 12)
    if only_sizes:
        sizes_json(counted)
    (counted / "00001.tar").unlink()
    told = (
        rf"1 of 4 shards are missing \({counted}/00001\.tar with 5 samples\), more than data\.max_missing_shards \(0\)"
    )
    with pytest.raises(DataError, match=told) as caught:
        images(pattern, lanes=2)
    capsys.readouterr()
    quarantine = Quarantine(tmp_path / "bad.jsonl")
    loader = images(pattern, lanes=2, quarantine=quarantine, **remedy(caught))
    assert capsys.readouterr().out == f"left out: shard {counted}/00001.tar: it is missing, with 5 samples\n"
    batches = first(loader, 12)
    for a, b in zip(whole, batches, strict=True):  # the others keep their places, as when the shard vanishes in a run
        for asked, given in zip(a.samples, b.samples, strict=True):
            assert given == asked or asked[0] == 1 != given[0]
    for account in accounts_of(loader, batches).closed:
        assert account.rejected == (account.expected if account.shard == 1 else 0)
    (listed,) = quarantine.path.read_text().splitlines()
    assert json.loads(listed)["shard"] == f"{counted}/00001.tar"
    assert len(loader) == 14 and loader.fingerprint["samples"] == 14  # so that a run resumes
    assert loader.available == 9


def test_what_is_allowed_to_be_missing_is_no_bad_sample(counted: Path):
    """One in three samples is lost; max_bad_fraction is one in a hundred."""
    (counted / "00001.tar").unlink()
    loader = images(f"{counted}/*.tar", lanes=1, batch_size=1, max_missing_shards=0.25, on_bad=pytest.fail)
    assert len(first(loader, 300)) == 300
    assert sum(len(batch) for batch in loader.once(4)) == 9


def test_a_gap_in_the_numbers_is_an_error_or_left_out(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "00001.tar").unlink()
    pattern = f"{folder}/{{00000..00003}}.tar"
    with pytest.raises(
        DataError, match=r"00001\.tar with an unknown number of samples\), .* restore them, or"
    ) as caught:
        images(pattern, lanes=1)
    capsys.readouterr()
    loader = images(pattern, lanes=1, **remedy(caught))
    assert "00001.tar: it is missing, with an unknown number of samples" in capsys.readouterr().out
    assert len(loader) == 9
    assert {shard for batch in first(loader, 5) for shard, _ in batch.samples} == {0, 2, 3}


def test_validation_names_its_own_setting(counted: Path):
    (counted / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"or set validation\.max_missing_shards=0\.25"):
        held_out(HeldOutConfig(shards=f"{counted}/*.tar"), image_size=8)
    config = HeldOutConfig(shards=f"{counted}/*.tar", max_missing_shards=0.25)
    assert sum(len(batch) for batch in held_out(config, image_size=8).once(4)) == 9


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_the_setting_is_a_fraction(fraction: float):
    with pytest.raises(ValueError, match="max_missing_shards .* must be a fraction from 0 to 1"):
        DataConfig(shards="x.tar", max_missing_shards=fraction)


def test_all_shards_missing_is_an_error_under_any_setting(counted: Path):
    for path in counted.glob("*.tar"):
        path.unlink()
    with pytest.raises(DataError, match=r"no shard matches .*holds 1 \.json: give paths of \.tar files"):
        images(f"{counted}/*.tar", max_missing_shards=1.0)


def test_a_manifest_that_is_named_knows_what_is_gone(folder: Path, tmp_path: Path):
    out = tmp_path / "all.json"
    write_manifest([f"{folder}/*.tar", "--out", str(out)])
    (folder / "00002.tar").unlink()
    with pytest.raises(DataError, match=r"1 of 4 shards are missing \(\S*00002\.tar with 2 samples"):
        images(f"{folder}/*.tar", manifest=str(out))
    assert len(images(f"{folder}/0000[013].tar", manifest=str(out))) == 12  # it was not asked for


def test_a_listed_url_that_its_manifest_counts_is_missed():
    files = fsspec.filesystem("memory")
    files.pipe_file("/lost/0.tar", b"")
    files.pipe_file("/lost/manifest.json", b'{"0.tar": {"count": 5}, "1.tar": {"count": 7}}')
    with pytest.raises(DataError, match=r"1 of 2 shards are missing \(memory://lost/1\.tar with 7 samples\)"):
        images("memory://lost/*.tar")


# --- empty shards ---


@pytest.mark.parametrize("with_manifest", [False, True])
def test_an_empty_shard_is_named_and_changes_nothing(
    folder: Path, with_manifest: bool, capsys: pytest.CaptureFixture[str]
):
    plain = images(f"{folder}/*.tar")
    before = first(plain, 5)
    (folder / "00009.tar").touch()
    if with_manifest:
        assert write_manifest([str(folder)]) == 0
    capsys.readouterr()
    loader = images(f"{folder}/*.tar")
    assert re.search(r"^left out: shard \S*00009\.tar: it holds no samples", capsys.readouterr().out)
    assert all(same(a, b) for a, b in zip(before, first(loader, 5), strict=True))
    assert loader.fingerprint["sha256"] == plain.fingerprint["sha256"]


def test_shards_that_are_all_empty_are_an_error(tmp_path: Path):
    (tmp_path / "0.tar").touch()
    with pytest.raises(DataError, match=r"none of the shards of data\.shards holds a sample: give others"):
        images(f"{tmp_path}/*.tar")


# --- the manifest's command ---


def test_the_manifest_is_written_beside_a_gap_and_tells_of_it(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "00001.tar").unlink()
    (folder / "00002.tar").write_bytes(b"")
    assert write_manifest([f"{folder}/{{00000..00003}}.tar"]) == 0
    told = capsys.readouterr().err
    assert f"warning: {folder}/00001.tar is missing: it is left out" in told
    assert f"warning: {folder}/00002.tar holds no samples" in told
    counts = {name: entry["count"] for name, entry in json.loads((folder / "manifest.json").read_text()).items()}
    assert counts == {"00000.tar": 3, "00002.tar": 0, "00003.tar": 4}


def test_a_manifest_that_is_written_again_tells_what_it_no_longer_counts(
    counted: Path, capsys: pytest.CaptureFixture[str]
):
    """That is the other remedy for a shard that is gone for good, and runs that began without it go on."""
    (counted / "00001.tar").rename(counted / "gone")
    manifest = (counted / "manifest.json").read_text()
    entries = {name: entry for name, entry in json.loads(manifest).items() if name != "00001.tar"}
    (counted / "manifest.json").write_text(json.dumps(entries))
    before = images(f"{counted}/*.tar", lanes=1)
    (counted / "manifest.json").write_text(manifest)
    with pytest.raises(DataError, match="restore them, write the manifest again if they are gone for good, or set"):
        images(f"{counted}/*.tar", lanes=1)
    assert write_manifest([str(counted)]) == 0
    assert images(f"{counted}/*.tar", lanes=1).fingerprint == before.fingerprint
    assert "00001.tar is missing, and had 5 samples by the manifest until now" in capsys.readouterr().err
    assert len(images(f"{counted}/*.tar", lanes=1)) == 9


def test_a_broken_manifest_is_written_again(counted: Path):
    (counted / "manifest.json").write_text("{broken")
    assert write_manifest([str(counted)]) == 0
    assert len(images(f"{counted}/*.tar")) == 14


# --- names ---


@pytest.mark.parametrize("name", ["my set [v2]", "odd {1..2}", "a{b", "c}d", "what? *", "back\\slash", "ünï"])
@pytest.mark.parametrize("pattern", ["00000.tar", "*.tar", "{00000..00003}.tar", "0000[0-3].tar"])
def test_a_path_that_exists_is_that_path_whatever_it_looks_like(folder: Path, name: str, pattern: str):
    odd = folder.rename(folder.parent / name)
    assert len(images(f"{odd}/{pattern}", lanes=1, batch_size=1)) == (3 if pattern == "00000.tar" else 14)
    assert write_manifest([str(odd)]) == 0
    assert len(json.loads((odd / "manifest.json").read_text())) == 4
    (odd / "00003.tar").unlink()
    if pattern != "00000.tar":
        with pytest.raises(DataError, match="1 of 4 shards are missing"):
            images(f"{odd}/{pattern}", lanes=1)


@pytest.mark.parametrize("name", ["[1].tar", "{1..2}.tar", "{1.tar", "a b?.tar"])
def test_so_is_a_file(folder: Path, name: str):
    (folder / "00002.tar").rename(folder / name)
    (folder / "1.tar").write_bytes((folder / "00001.tar").read_bytes())  # what the pattern would match
    assert [source.location for source in expand(f"{folder}/{name}")] == [f"{folder}/{name}"]
    assert len(images(f"{folder}/{name}", lanes=1, batch_size=1)) == 2


def test_only_then_it_is_a_pattern(folder: Path):
    (folder / "[01].tar").mkdir()  # another folder has such a name
    assert len(expand(f"{folder}/0000[01].tar")) == 2
    with pytest.raises(ValueError, match="has a brace without its partner, and there is no such file"):
        expand(f"{folder}/{{0.tar")


def test_a_tilde_is_the_home_folder(counted: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(counted.parent))
    monkeypatch.chdir(tmp_path)
    for pattern in ("~/shards/*.tar", "~/shards/{00000..00003}.tar", ["~/shards/00000.tar", "~/shards/0000[1-3].tar"]):
        config = DataConfig(shards=pattern if isinstance(pattern, str) else tuple(pattern), image_size=8, batch_size=2)
        assert len(CaptionedImages(config, seed=0)) == 14
    assert write_manifest(["~/shards", "--out", "~/m.json"]) == 0
    assert (counted.parent / "m.json").exists()
    (counted / "manifest.json").unlink()
    files = fsspec.filesystem("memory")
    files.pipe_file("/home/0.tar", (counted / "00000.tar").read_bytes())
    write_manifest(["memory://home/0.tar", "--out", "~/m.json"])
    loader = images("memory://home/0.tar", manifest="~/m.json", cache="~/cache", lanes=1, batch_size=1)
    assert len(loader.batch(0)) == 1 and os.listdir(counted.parent / "cache")
    with pytest.raises(ValueError, match="~nobody-here/x.tar: there is no home folder of that name"):
        expand("~nobody-here/x.tar")
    assert not (tmp_path / "~").exists()


def test_a_folder_of_shards_is_told_how_to_be_given(folder: Path):
    """And what the message gives works."""
    with pytest.raises(DataError, match="is a folder: give") as caught:
        images(str(folder))
    given = str(caught.value).rpartition("give ")[2]
    assert len(images(given)) == 14
