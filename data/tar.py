"""Read the member table of an untrusted tar: nothing is extracted, and damage loses only the members that it hit.

Python's own reader stops silently at a damaged header after the first, so only tarfile's header parser is used.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK)
LONGEST_RECORD = 1 << 20  # bytes of a long name or of pax records
CHUNK = 1 << 20  # most bytes searched at once for the next header
MOST_DAMAGE = 1000  # limit on damaged places, and on header candidates after each, so that no tar hangs the reader
FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
LINK_TYPES = (tarfile.LNKTYPE, tarfile.SYMTYPE)
WITHOUT_DATA = (*LINK_TYPES, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
RECORD_TYPES = (*PAX_TYPES, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class Kind(Enum):
    PLAIN = "a plain file"
    LINK = "a link"
    SPARSE = "a sparse file"
    OTHER = "not a plain file"  # a folder, a device


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    offset: int  # of its data
    size: int
    kind: Kind = Kind.PLAIN


@dataclass(frozen=True, slots=True)
class Damage:
    offset: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Given:
    """Fields that a record overrides in the header of the next member."""

    name: str | None = None
    size: int | None = None


NOTHING_GIVEN = _Given()


class _Damaged(Exception):
    pass


def read_members(file: BinaryIO, *, incomplete: Callable[[], bool]) -> Iterator[Member | Damage]:
    """Yield the members of a tar in order, and each damaged place; continue at the next valid header.

    incomplete() is asked at the apparent end of the tar whether samples are missing: a header may have been overwritten
    with zeros.
    """
    length, given = file.seek(0, 2), NOTHING_GIVEN
    at, damages = 0, 0
    search_from = 0  # after lost bytes, a header may lie within the apparent data of the previous member
    while damages < MOST_DAMAGE:
        try:
            if _read(file, at, BLOCK) != ZEROS:
                member, given, at = _read_header(file, at, length, given)
                if member is not None:
                    search_from = member.offset
                    yield member
                continue
            if not incomplete():
                return
            found = _next_header(file, at + BLOCK)
        except _Damaged as error:
            yield Damage(at, str(error))
            damages, given = damages + 1, NOTHING_GIVEN
            found = _next_header(file, search_from or at + BLOCK)
            if found == at:  # its checksum is valid, but its content is not
                found = _next_header(file, at + BLOCK)
        if found is None:
            return
        at, search_from = found, found + BLOCK


def _read_header(file: BinaryIO, at: int, length: int, given: _Given) -> tuple[Member | None, _Given, int]:
    """Return the member of the header at `at`, the overrides for the next one, and the next header's offset."""
    block = _read(file, at, BLOCK)
    header, data = _parse(block), at + BLOCK
    size = header.size if given.size is None or header.type in RECORD_TYPES else given.size
    stored = 0 if header.type in WITHOUT_DATA else size
    if stored < 0 or data + stored > length:
        raise _Damaged(f"{header.name} is truncated")
    member = None
    if header.type in RECORD_TYPES:
        given = _record(file, header, data, given)
    else:
        if header.type == tarfile.GNUTYPE_SPARSE:
            data = _after_sparse_map(file, block, data)
        member = Member(given.name or header.name, data, stored, _kind(header))
        given = NOTHING_GIVEN
    return member, given, data + -(-stored // BLOCK) * BLOCK


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


def _parse(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # pyright: ignore[reportArgumentType]
    except tarfile.HeaderError as error:
        raise _Damaged("truncated" if len(block) < BLOCK else f"not a valid header ({error})") from error


def _kind(header: tarfile.TarInfo) -> Kind:
    if header.type in FILE_TYPES:
        return Kind.PLAIN
    if header.type in LINK_TYPES:
        return Kind.LINK
    return Kind.SPARSE if header.type == tarfile.GNUTYPE_SPARSE else Kind.OTHER


def _record(file: BinaryIO, header: tarfile.TarInfo, data: int, given: _Given) -> _Given:
    if header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
        return given
    if header.size > LONGEST_RECORD:
        raise _Damaged(f"a record of {header.size} bytes")
    content = _read(file, data, header.size)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return _Given(content.rstrip(b"\0").decode("utf-8", "surrogateescape"), given.size)
    records = _pax_records(content)
    size = records.get("size", "")
    if size and not (size.isascii() and size.isdigit() and len(size) < 20):
        raise _Damaged("a pax record without a valid size")
    name = records["path"].rstrip("/") if "path" in records else given.name
    return _Given(name, int(size) if size else given.size)


def _pax_records(content: bytes) -> dict[str, str]:
    """Parse pax records: each is "LENGTH KEY=VALUE" and a newline, LENGTH counting the full record."""
    records: dict[str, str] = {}
    while content.rstrip(b"\0"):
        digits, space, _ = content[:20].partition(b" ")
        if not (space and digits.isdigit() and len(digits) < int(digits) <= len(content)):
            raise _Damaged("pax records that do not parse")
        key, _, value = content[len(digits) + 1 : int(digits) - 1].partition(b"=")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        content = content[int(digits) :]
    return records


def _after_sparse_map(file: BinaryIO, block: bytes, data: int) -> int:
    """Find the data offset of an old GNU sparse member: its map may continue in further blocks."""
    more = block[482]
    while more:
        block = _read(file, data, BLOCK)
        data, more = data + BLOCK, len(block) == BLOCK and block[504]
    return data


def _next_header(file: BinaryIO, start: int) -> int | None:
    """Find the next header with a valid checksum at or after `start`; None if there is none.

    Its offset need not be a multiple of 512: bytes may have been lost before it.
    """
    size, tries = 8 * BLOCK, 0  # it is usually near
    while len(chunk := _read(file, start, size + BLOCK)) >= BLOCK:
        magic = chunk.find(b"ustar")
        while magic >= 0 and tries < MOST_DAMAGE:
            place = magic - 257  # of the magic in a header
            if 0 <= place < size:
                tries += 1
                try:
                    _parse(chunk[place : place + BLOCK])
                    return start + place
                except _Damaged:
                    pass
            magic = chunk.find(b"ustar", magic + 1)
        start, size = start + size, min(2 * size, CHUNK)
    return None
