"""The walk over a tar's headers: what it finds in each format, beside tarfile, and that no tar holds it up."""

from __future__ import annotations

import io
import tarfile
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.tar import Damage, Kind, Member, read_members

LONG = "a/" * 120 + "long.jpg"
NAMES = ["0.jpg", "dir/1.txt", "\u00e9.png", LONG, "x" * 150 + ".json"]


def packed(names: list[str], format: int, *, size: int = 700) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = size + number
            tar.addfile(info, io.BytesIO(bytes([number]) * info.size))
    return buffer.getvalue()


def walk(content: bytes, *, incomplete: bool = False) -> list[Member | Damage]:
    return list(read_members(io.BytesIO(content), incomplete=lambda: incomplete))


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_kind_are_those_of_tarfile(format: int):
    content = packed(NAMES, format)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert walk(content) == [Member(member.name, member.offset_data, member.size) for member in tar]
    assert [member.name for member in walk(content) if isinstance(member, Member)] == NAMES


@given(st.lists(st.text("ab/\u00e9.", min_size=1, max_size=300), max_size=4), st.sampled_from([0, 1, 2]))
def test_any_names_are_those_of_tarfile(names: list[str], format: int):
    try:
        content = packed(names, format, size=1)
    except ValueError:  # ustar cannot hold it
        return
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        files = [(member.name, member.offset_data) for member in tar if member.isfile()]
    found = [(one.name, one.offset) for one in walk(content) if isinstance(one, Member) and one.kind is Kind.PLAIN]
    assert found == files


def test_a_size_in_a_pax_record_counts():
    """As of members of more than 8 GB, whose header has no room for it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size, info.pax_headers = 700, {"size": "700"}
        tar.addfile(info, io.BytesIO(bytes(700)))
        tar.addfile(tarfile.TarInfo("1.jpg"))
    assert [one.name for one in walk(buffer.getvalue()) if isinstance(one, Member)] == ["0.jpg", "1.jpg"]


def names_found(content: bytes) -> list[str]:
    return [one.name for one in walk(content) if isinstance(one, Member)]


@pytest.mark.parametrize("lost", [1, 100, 511, 512, 5000])
def test_bytes_that_are_lost_cost_no_other_member(lost: int):
    """The first seems to hold some of the second's header, which stands at no multiple of 512."""
    content = packed(NAMES[:3], tarfile.USTAR_FORMAT, size=20_000)
    assert names_found(content[:9000] + content[9000 + lost :]) == ["0.jpg", "dir/1.txt", "\u00e9.png"]


def test_a_size_that_is_too_large_swallows_nothing():
    content = bytearray(packed([f"{number}.jpg" for number in range(6)], tarfile.USTAR_FORMAT))
    edit_size(content, 1536, 3000)
    assert names_found(bytes(content)) == [f"{number}.jpg" for number in range(6)]


def edit_size(content: bytearray, at: int, size: int) -> None:
    """Of the header there, with a checksum that is right again."""
    content[at + 124 : at + 136] = b"%011o\0" % size
    content[at + 148 : at + 156] = b" " * 8
    content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])


@pytest.mark.parametrize(
    "content",
    [
        b"ustar\0" * 3_000_000,
        (b"x" * 257 + b"ustar\0" + b"x" * 249) * 40_000,
    ],
)
def test_a_flood_of_seeming_headers_holds_nobody_up(content: bytes):
    began = time.monotonic()
    assert all(isinstance(one, Damage) for one in walk(content, incomplete=True))
    assert time.monotonic() - began < 20


def test_a_flood_of_headers_that_promise_too_much_holds_nobody_up():
    info = tarfile.TarInfo("0.jpg")
    info.size = 8**11 - 1
    began = time.monotonic()
    found = walk(info.tobuf(tarfile.USTAR_FORMAT) * 100_000, incomplete=True)
    assert {one.reason for one in found if isinstance(one, Damage)} == {"0.jpg is truncated"}
    assert 100 < len(found) < 10_000 and time.monotonic() - began < 20


@pytest.mark.parametrize(
    "records", [b"", b"x", b"5", b"99 path=a\n", b"0 path=a\n", b"-1 path=a\n", b"11 size=-9\n", b"\xff"]
)
def test_pax_records_that_do_not_parse_are_damage(records: bytes):
    head = tarfile.TarInfo("PaxHeader")
    head.type, head.size = tarfile.XHDTYPE, len(records)
    content = head.tobuf(tarfile.USTAR_FORMAT) + records.ljust(512 if records else 0, b"\0")
    found = walk(content + packed(["1.jpg"], tarfile.USTAR_FORMAT))
    assert [one.name for one in found if isinstance(one, Member)] == ["1.jpg"]
    assert (len(found) == 1) == (records == b"")


def test_a_record_that_is_too_long_is_damage():
    head = tarfile.TarInfo("PaxHeader")
    head.type, head.size = tarfile.GNUTYPE_LONGNAME, (1 << 20) + 1
    content = head.tobuf(tarfile.USTAR_FORMAT) + bytes(2 << 20) + packed(["1.jpg"], tarfile.USTAR_FORMAT)
    first, second = walk(content)
    assert first == Damage(0, "a record of 1048577 bytes") and isinstance(second, Member)
