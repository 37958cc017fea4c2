"""Shards: which files are named, what they hold, and what is said of those that are not whole."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from data import DataError
from data.shards import Shard, expand_shards

MEMBERS = [
    ("000000000.jpg", b"J" * 700),
    ("000000000.txt", b"a cat"),
    ("000000001.jpg", b"K" * 900),
    ("000000001.txt", b"a dog"),
    ("000000001.JSON", b"{}"),
]


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


@pytest.fixture
def four_files(tmp_path: Path) -> Path:
    for name in ("00000.tar", "00001.tar", "00002.tar", "extra.tar.gz"):
        (tmp_path / name).touch()
    return tmp_path


def test_brace_ranges_globs_and_lists_are_expanded(four_files: Path):
    root = str(four_files)
    assert names(expand_shards(root + "/{00000..00002}.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    assert names(expand_shards(root + "/0000[12].tar")) == ["00001.tar", "00002.tar"]
    assert names(expand_shards(root + "/*.tar*")) == ["00000.tar", "00001.tar", "00002.tar", "extra.tar.gz"]
    mixed = [root + "/extra.tar.gz", root + "/{00001,00000}.tar"]
    assert names(expand_shards(mixed)) == ["extra.tar.gz", "00001.tar", "00000.tar"]


def test_a_pattern_without_a_file_is_named(four_files: Path):
    with pytest.raises(DataError, match=r"00003\.tar.*00000\.\.00003"):
        expand_shards(str(four_files) + "/{00000..00003}.tar")
    with pytest.raises(DataError, match="none-"):
        expand_shards(str(four_files / "none-*.tar"))


@pytest.mark.parametrize("name", ["00000.tar", "00000.tar.gz", "00000.tgz"])
def test_samples_are_read_by_number(tmp_path: Path, write_tar: Callable[..., Path], name: str):
    path = tmp_path / name
    write_tar(tmp_path / "whole.tar", MEMBERS)
    content = (tmp_path / "whole.tar").read_bytes()
    path.write_bytes(content if name.endswith(".tar") else gzip.compress(content))
    shard = Shard(path)
    assert len(shard) == 2
    assert shard[1].members == {"jpg": b"K" * 900, "txt": b"a dog", "json": b"{}"}
    assert shard[0].members == {"jpg": b"J" * 700, "txt": b"a cat"}
    assert (shard[0].shard, shard[0].key, shard[1].key) == (str(path), "000000000", "000000001")


def test_keys_are_those_of_webdataset(tmp_path: Path, write_tar: Callable[..., Path]):
    """Folders belong to the key (`tar -cf x.tar .` writes ./a.jpg); what is no sample is passed over."""
    from webdataset.compat import WebDataset

    members = [(name, name.encode()) for name in ("./a.jpg", "./a.txt", "v1.2/b.jpg", "v1.2/b.seg.png")]
    path = write_tar(tmp_path / "00000.tar", [("README", b"?"), *members, ("._a", b"?")])
    shard = Shard(path)
    read = [(shard[index].key, shard[index].members) for index in range(len(shard))]
    theirs = WebDataset(str(path), shardshuffle=False, empty_check=False)
    assert read == [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in theirs]
    assert [key for key, _ in read] == ["./a", "v1.2/b"]


def test_members_of_one_sample_need_not_be_neighbours(tmp_path: Path, write_tar: Callable[..., Path]):
    shard = Shard(write_tar(tmp_path / "x.tar", [("a.jpg", b"1"), ("b.jpg", b"2"), ("a.txt", b"3"), ("b.txt", b"4")]))
    assert [shard[0].members, shard[1].members] == [{"jpg": b"1", "txt": b"3"}, {"jpg": b"2", "txt": b"4"}]


def refused(path: Path, told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        Shard(path)
    assert str(path) in str(caught.value)


def test_a_tar_cut_anywhere_is_refused(tmp_path: Path, write_tar: Callable[..., Path]):
    """Also at the border of two samples and within a header, which tarfile alone takes for the end."""
    content = write_tar(tmp_path / "whole.tar", MEMBERS).read_bytes()
    end = content.rindex(b"{}") + 512  # behind it stand only the zeros of the end
    path = tmp_path / "cut.tar"
    for length in range(0, end + 1, 128):
        path.write_bytes(content[:length])
        refused(path, "copy it again")


def test_a_damaged_header_is_refused(tmp_path: Path, write_tar: Callable[..., Path]):
    content = bytearray(write_tar(tmp_path / "x.tar", MEMBERS).read_bytes())
    content[content.index(b"000000001.jpg")] ^= 0xFF
    (tmp_path / "x.tar").write_bytes(content)
    refused(tmp_path / "x.tar", "damaged after 1 samples")


@pytest.mark.parametrize("keep", [5, 60, -9, -1])
def test_a_gzip_cut_anywhere_is_refused(tmp_path: Path, write_tar: Callable[..., Path], keep: int):
    path = write_tar(tmp_path / "00000.tar.gz", MEMBERS)
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "copy it again")


def test_what_is_no_tar_is_refused(tmp_path: Path, write_tar: Callable[..., Path]):
    (tmp_path / "text.tar").write_bytes(b"<html>not found</html>" * 100)
    refused(tmp_path / "text.tar", "cannot be read as a tar")
    (tmp_path / "text.tar.gz").write_bytes(b"<html>not found</html>" * 100)
    refused(tmp_path / "text.tar.gz", "cannot be read as a tar")
    write_tar(tmp_path / "whole.tar", MEMBERS).rename(tmp_path / "plain.tar.gz")
    refused(tmp_path / "plain.tar.gz", "cannot be read as a tar")
    refused(tmp_path / "missing.tar", "No such file")
    refused(tmp_path, "directory")


def test_an_empty_tar_is_refused(tmp_path: Path, write_tar: Callable[..., Path]):
    refused(write_tar(tmp_path / "none.tar", []), "holds no samples")
    refused(write_tar(tmp_path / "readme.tar", [("README", b"hello")]), "holds no samples")


def test_the_count_must_agree_with_sizes_json(tmp_path: Path, write_tar: Callable[..., Path]):
    path = write_tar(tmp_path / "00000.tar", MEMBERS)
    sizes = tmp_path / "sizes.json"
    sizes.write_text(json.dumps({"00000.tar": 3, "00001.tar": 7}))
    refused(path, r"holds 2 samples, sizes\.json says 3")
    sizes.write_text(json.dumps({"00000.tar": 2}))
    assert len(Shard(path)) == 2
    sizes.write_text(json.dumps({"another.tar": 9}))
    assert len(Shard(path)) == 2


@pytest.mark.parametrize("content", ["{cut", "[2]"])
def test_a_broken_sizes_json_is_named(tmp_path: Path, write_tar: Callable[..., Path], content: str):
    path = write_tar(tmp_path / "00000.tar", MEMBERS)
    (tmp_path / "sizes.json").write_text(content)
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "sizes.json"))):
        Shard(path)
