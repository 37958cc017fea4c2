"""The member table of a tar that nobody vouches for: nothing is extracted, and damage costs only what it hit.

Python's own reader stops in silence at a damaged header that is not the first, so it is not used; of tarfile only the
parsing of a header is.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK)
LONGEST_RECORD = 1 << 20  # bytes of a long name or of pax records
CHUNK = 1 << 20  # bytes looked through at once for the next header
FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
LINK_TYPES = (tarfile.LNKTYPE, tarfile.SYMTYPE)
WITHOUT_DATA = (*LINK_TYPES, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)
PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
RECORD_TYPES = (*PAX_TYPES, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


@dataclass(frozen=True, slots=True)
class Member:
    name: str
    offset: int  # of its data
    size: int
    strange: str = ""  # what it is instead of a file: "a link"


@dataclass(frozen=True, slots=True)
class Damage:
    offset: int
    reason: str


class _Damaged(Exception):
    pass


def read_members(file: BinaryIO, *, incomplete: Callable[[], bool]) -> Iterator[Member | Damage]:
    """The members of a tar in their order, and each place where it is damaged; goes on at the next sound header.

    incomplete() says, where the tar seems to end, whether samples are missing: zeros may have been written over a
    header.
    """
    length = file.seek(0, 2)
    at, name, size = 0, None, None  # the last two as a record before the member gives them
    while True:
        block = _read(file, at, BLOCK)
        if block == ZEROS:
            if not incomplete():
                return
            found = _next_header(file, at + BLOCK)
            if found is None:
                return
            at = found
            continue
        try:
            header, data = _parse(block), at + BLOCK
            size = header.size if size is None else size
            stored = 0 if header.type in WITHOUT_DATA else size
            if stored < 0 or data + stored > length:
                raise _Damaged(f"{header.name} is cut short")
            if header.type in RECORD_TYPES:
                name, size = _record(file, header, data, name)
            else:
                if header.type == tarfile.GNUTYPE_SPARSE:
                    data = _after_sparse_map(file, block, data)
                yield Member(name or header.name, data, stored, _strange(header))
                name, size = None, None
            at = data + -(-stored // BLOCK) * BLOCK
        except _Damaged as error:
            yield Damage(at, str(error))
            found, name, size = _next_header(file, at + BLOCK), None, None
            if found is None:
                return
            at = found


def _read(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)


def _parse(block: bytes) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")  # pyright: ignore[reportArgumentType]
    except tarfile.HeaderError as error:
        raise _Damaged("cut short" if len(block) < BLOCK else f"no sound header ({error})") from error


def _strange(header: tarfile.TarInfo) -> str:
    if header.type in FILE_TYPES:
        return ""
    if header.type in LINK_TYPES:
        return "a link"
    return "a sparse file" if header.type == tarfile.GNUTYPE_SPARSE else "no plain file"


def _record(file: BinaryIO, header: tarfile.TarInfo, data: int, name: str | None) -> tuple[str | None, int | None]:
    """The name and size that a record gives to the member behind it."""
    if header.type in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
        return name, None
    if header.size > LONGEST_RECORD:
        raise _Damaged(f"a record of {header.size} bytes")
    content = _read(file, data, header.size)
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return content.rstrip(b"\0").decode("utf-8", "surrogateescape"), None
    records = _pax_records(content)
    size = records.get("size", "")
    if size and not (size.isascii() and size.isdigit() and len(size) < 20):
        raise _Damaged("a pax record with no size")
    return records.get("path", name), int(size) if size else None


def _pax_records(content: bytes) -> dict[str, str]:
    """pax records, each "LENGTH KEY=VALUE" and a newline, LENGTH being that of all of it."""
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
    """Where the data of an old GNU sparse member begin: its map may go on through further blocks."""
    more = block[482]
    while more:
        block = _read(file, data, BLOCK)
        data, more = data + BLOCK, len(block) == BLOCK and block[504]
    return data


def _next_header(file: BinaryIO, start: int) -> int | None:
    """The next place, at `start` or behind it, where a header with a right checksum stands; None if there is none.

    It need not stand at a multiple of 512: bytes may have been lost before it.
    """
    while len(chunk := _read(file, start, CHUNK + BLOCK)) >= BLOCK:
        magic = chunk.find(b"ustar")
        while magic >= 0:
            place = magic - 257  # of the magic in a header
            if 0 <= place < CHUNK:
                try:
                    _parse(chunk[place : place + BLOCK])
                    return start + place
                except _Damaged:
                    pass
            magic = chunk.find(b"ustar", magic + 1)
        start += CHUNK
    return None
