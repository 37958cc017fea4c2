"""Shards: which files are named, what they hold, and what is said of those that are not whole."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data.shards import BadSampleError, Shard
from data.sources import Source, expand
from ldm.errors import DataError

MEMBERS = [
    ("000000000.jpg", b"J" * 700),
    ("000000000.txt", b"a cat"),
    ("000000001.jpg", b"K" * 900),
    ("000000001.txt", b"a dog"),
    ("000000001.JSON", b"{}"),
]


def names(sources: list[Source]) -> list[str]:
    return [source.name for source in sources]


@pytest.fixture
def four_files(tmp_path: Path) -> Path:
    for name in ("00000.tar", "00001.tar", "00002.tar", "extra.tar.gz"):
        (tmp_path / name).touch()
    return tmp_path


def test_brace_ranges_globs_and_lists_are_expanded(four_files: Path):
    root = str(four_files)
    assert names(expand(root + "/{00000..00002}.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    assert names(expand(root + "/0000[12].tar")) == ["00001.tar", "00002.tar"]
    assert names(expand(root + "/*.tar*")) == ["00000.tar", "00001.tar", "00002.tar", "extra.tar.gz"]
    mixed = [root + "/extra.tar.gz", root + "/{00001,00000}.tar"]
    assert names(expand(mixed)) == ["extra.tar.gz", "00001.tar", "00000.tar"]


def test_a_pattern_without_a_file_is_named(four_files: Path):
    with pytest.raises(DataError, match=r"00003\.tar.*00000\.\.00003"):
        expand(str(four_files) + "/{00000..00003}.tar")
    with pytest.raises(DataError, match="none-"):
        expand(str(four_files / "none-*.tar"))


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
    """Folders belong to the key (`tar -cf x.tar .` writes ./a.jpg); what is no sample is passed over,
    and of a sample only pictures and texts are ever read."""
    from webdataset.compat import WebDataset

    members = [(name, name.encode()) for name in ("./a.jpg", "./a.txt", "v1.2/b.jpg", "v1.2/b.seg.pkl")]
    path = write_tar(tmp_path / "00000.tar", [("README", b"?"), *members, ("._a", b"?")])
    shard = Shard(path)
    read = [(shard[index].key, shard[index].members) for index in range(len(shard))]
    theirs = WebDataset(str(path), shardshuffle=False, empty_check=False)
    assert read == [(s["__key__"], {"jpg": s["jpg"]} | ({"txt": s["txt"]} if "txt" in s else {})) for s in theirs]
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
    for length in range(128, end + 1, 128):
        path.write_bytes(content[:length])
        refused(path, "copy it again")


def test_a_damaged_header_is_refused(tmp_path: Path, write_tar: Callable[..., Path]):
    content = bytearray(write_tar(tmp_path / "x.tar", MEMBERS).read_bytes())
    content[content.index(b"000000001.jpg")] ^= 0xFF
    (tmp_path / "x.tar").write_bytes(content)
    refused(tmp_path / "x.tar", "damaged after 1 samples")


def test_a_name_does_not_say_whether_a_shard_is_gzipped(tmp_path: Path, write_tar: Callable[..., Path]):
    write_tar(tmp_path / "plain.tar", MEMBERS).rename(tmp_path / "plain.tar.gz")
    assert len(Shard(tmp_path / "plain.tar.gz")) == 2


def test_gzip_files_behind_one_another_are_one(tmp_path: Path, write_tar: Callable[..., Path]):
    """As parallel packers write them."""
    content = write_tar(tmp_path / "whole.tar", MEMBERS).read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    assert len(Shard(tmp_path / "x.tar.gz")) == 2


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
    refused(tmp_path / "missing.tar", "No such file")
    refused(tmp_path, rf"is a folder: give {tmp_path}/\*\.tar")


def test_an_empty_tar_has_no_samples_and_says_what_it_has(tmp_path: Path, write_tar: Callable[..., Path]):
    (tmp_path / "zero.tar").touch()
    (tmp_path / "zero.tar.gz").write_bytes(gzip.compress(b""))
    write_tar(tmp_path / "none.tar", [])
    write_tar(tmp_path / "readme.tar", [("README", b"hello"), ("a/", b"")])
    told = {"zero.tar": "", "zero.tar.gz": "", "none.tar": "", "readme.tar": " (its members are README, a/)"}
    for name, held in told.items():
        assert (len(Shard(tmp_path / name)), Shard(tmp_path / name).emptiness) == (0, f"holds no samples{held}")
        with pytest.raises(DataError, match=f"{name}.* expected 2: copy it again|{name} cannot be read as a tar"):
            Shard(tmp_path / name, expected=2)


# --- with a count to hold it to ---


def read(shard: Shard) -> list[str]:
    """The keys of all that can be read; what is said of the others."""
    found: list[str] = []
    for index in range(len(shard)):
        try:
            raw = shard[index]
            found.append("; ".join(raw.faults.values()) or raw.key)
        except BadSampleError as error:
            found.append(str(error))
    return found


def test_what_stands_before_and_behind_a_damaged_header_is_read(tmp_path: Path, write_tar: Callable[..., Path]):
    members = [(f"{number}.{kind}", b"x" * 700) for number in range(4) for kind in ("jpg", "txt")]
    content = bytearray(write_tar(tmp_path / "x.tar", members).read_bytes())
    for name in (b"1.jpg", b"1.txt"):
        content[content.index(name)] ^= 0xFF
    (tmp_path / "x.tar").write_bytes(content)
    shard = Shard(tmp_path / "x.tar", expected=4)
    assert (len(shard), shard.missing) == (4, 1)
    *good, lost = read(shard)
    assert good == ["0", "2", "3"] and "it is missing (truncated or damaged after 1 samples, at byte 3072" in lost
    assert [shard.key(index) for index in range(4)] == ["0", "2", "3", "#3"]


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.99])
@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_what_stands_before_a_cut_is_read(tmp_path: Path, write_tar: Callable[..., Path], name: str, keep: float):
    members = [(f"{number:02d}.{kind}", os.urandom(40_000)) for number in range(20) for kind in ("jpg", "txt")]
    path = write_tar(tmp_path / name, members)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    shard = Shard(path, expected=20)
    whole = [key for key in read(shard) if "missing" not in key]
    assert 20 * keep - 4 < len(whole) <= 20 * keep + 1
    assert whole == [f"{number:02d}" for number in range(len(whole))] and shard.damage


def test_zeros_in_the_middle_are_not_the_end_while_samples_are_missing(tmp_path: Path, write_tar: Callable[..., Path]):
    members = [(f"{number}.{kind}", b"x") for number in range(4) for kind in ("jpg", "txt")]
    content = bytearray(write_tar(tmp_path / "x.tar", members).read_bytes())
    content[4 * 1024 : 4 * 1024 + 1024] = bytes(1024)  # all of 2.jpg: header and data
    (tmp_path / "x.tar").write_bytes(content)
    assert read(Shard(tmp_path / "x.tar", expected=4)) == ["0", "1", "2", "3"]  # 2 is a half, which the loader rejects
    assert len(Shard(tmp_path / "x.tar", expected=2)) == 2


def test_what_stands_behind_the_end_is_no_sample(tmp_path: Path, write_tar: Callable[..., Path]):
    first, second = (
        write_tar(tmp_path / f"{name}.tar", [(f"{name}.jpg", b"x"), (f"{name}.txt", b"x")]).read_bytes()
        for name in "ab"
    )
    (tmp_path / "x.tar").write_bytes(first + second)
    assert len(Shard(tmp_path / "x.tar")) == 1
    assert read(Shard(tmp_path / "x.tar", expected=1)) == ["a"]


def test_samples_in_excess_are_told_and_halves_are_not_chosen_before_whole_ones(
    tmp_path: Path, write_tar: Callable[..., Path]
):
    halves = [("0.jpg", b"x"), ("other.txt", b"x"), ("1.jpg", b"x"), ("1.txt", b"x")]
    shard = Shard(write_tar(tmp_path / "x.tar", halves), expected=2)
    assert read(shard) == ["1", "0"] and "1 samples more than counted" in shard.damage


def test_nothing_at_all_is_an_error_even_with_a_count(tmp_path: Path, write_tar: Callable[..., Path]):
    for content in (b"", b"<html>" * 1000, bytes(10240)):
        (tmp_path / "x.tar").write_bytes(content)
        with pytest.raises(DataError, match=r"x\.tar"):
            Shard(tmp_path / "x.tar", expected=2)


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(DataError, match="not a plain file"):
        Shard(tmp_path / "x.tar", expected=2)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["a.jpg", "a.txt", "a.jpg"], "its jpg occurs twice"),
        (["a.jpg", "a.txt", "a.TXT"], "its txt occurs twice"),
        (["a.txt", "link:a.jpg"], "its jpg is a link"),
        (["a.txt", "sparse:a.jpg"], "its jpg is a sparse file"),
    ],
)
def test_a_strange_member_spoils_its_sample_alone(tmp_path: Path, names: list[str], told: str):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in [*names, "b.jpg", "b.txt"]:
            info = tarfile.TarInfo(name.rpartition(":")[2])
            if name.startswith("link:"):
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            elif name.startswith("sparse:"):
                info.type = tarfile.GNUTYPE_SPARSE
            tar.addfile(info, io.BytesIO(b""))
    assert read(Shard(tmp_path / "x.tar")) == [told, "b"]


def test_links_devices_and_folders_alone_are_no_samples(tmp_path: Path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        ):
            info = tarfile.TarInfo(f"{number}.jpg")
            info.type, info.linkname = kind, "b.jpg"
            tar.addfile(info)
        for name in ("../../b.jpg", "/etc/c.jpg"):  # nothing is extracted: only names
            tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
    assert read(Shard(tmp_path / "x.tar")) == ["../../b", "/etc/c"]


@pytest.mark.parametrize("name", ["a.txt", "a.jpg"])
def test_a_member_that_is_too_large_is_never_read(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data.shards.LARGEST_IMAGE", 3 << 20)
    with (tmp_path / "x.tar").open("wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 4 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    (told,) = read(Shard(tmp_path / "x.tar"))
    assert told == f"its {name[2:]} has 4,194,304 bytes, more than {'1,048,576' if 'txt' in name else '3,145,728'}"


def test_a_gzip_that_unpacks_without_end_is_stopped(
    tmp_path: Path, write_tar: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("data.shards.LARGEST_UNPACKED", 1 << 20)
    path = write_tar(tmp_path / "x.tar.gz", [("a.jpg", b"x"), ("a.txt", b"x"), ("b.jpg", bytes(9 << 20))])
    with pytest.raises(DataError, match="more than 1,048,576 bytes unpacked"):
        Shard(path)
    assert read(Shard(path, expected=1)) == ["a"]
