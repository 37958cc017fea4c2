"""Index tar shards in img2dataset's layout for random access.

A shard is a tar in which KEY.jpg (or another ending of data.pictures.EXTENSIONS), KEY.txt and KEY.json with the same
KEY form a sample; other members are never read. A gzipped shard has no random access, so it is unpacked into memory:
keep those small.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data.pictures import EXTENSIONS as IMAGE_EXTENSIONS
from data.tar import Damage, Kind, Member, read_members
from ldm.errors import DataError

# KEY.EXTENSION as webdataset splits it: folders belong to the key, all after the first dot of the file name to the
# extension. Members with other names (a README, macOS's ._files) are not samples.
MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
TEXT_EXTENSIONS = ("txt", "json")
LARGEST_MEMBER = {"txt": 1 << 20, "json": 1 << 20}  # bytes
LARGEST_IMAGE = 64 << 20  # bytes
LARGEST_UNPACKED = 4 << 30  # bytes of a gzipped shard
GZIP = b"\x1f\x8b"


class BadSampleError(Exception):
    """A sample cannot be used, for the reason in the message; the loader turns it into a BadSample."""


class MissingSampleError(BadSampleError):
    """A sample is missing from its shard."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """The undecoded members of one sample, by extension ("webp", "txt", "json")."""

    shard: str
    key: str
    members: dict[str, bytes]


@dataclass(slots=True)
class _Entry:
    key: str
    # extension -> offset and size
    places: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    problem: str = ""

    @property
    def complete(self) -> bool:
        return not (self.places.keys().isdisjoint(IMAGE_EXTENSIONS) or self.places.keys().isdisjoint(TEXT_EXTENSIONS))

    def add(self, extension: str, member: Member) -> None:
        most = LARGEST_MEMBER.get(extension, LARGEST_IMAGE)
        if member.kind is not Kind.PLAIN:
            self.problem = f"its {extension} is {member.kind.value}"
        elif extension in self.places:
            self.problem = f"its {extension} occurs twice"
        elif member.size > most:
            self.problem = f"its {extension} has {member.size:,} bytes, more than {most:,}"
        self.places[extension] = (member.offset, member.size)


class Shard:
    """One tar file. Its member table is read once; samples are then read by number.

    expected: the number of samples. Without it, a damaged shard is refused, because the loss could not be counted. With
    it, all readable samples are read and `damage` describes the rest: missing samples have the last numbers, which
    raise BadSampleError; surplus samples are out of reach.

    name: the shard's name in messages; None: its path.
    Raises DataError if the file is missing or not a tar and, without `expected`, if it is damaged or empty.
    """

    def __init__(self, path: Path, *, expected: int | None = None, name: str | None = None) -> None:
        self.path, self.name, self.damage = path, name or str(path), ""
        self._expected = expected
        self._table: list[_Entry] = []
        try:
            self._unpacked, problem = _unpacked(path)
            with self._open() as file:
                found = self._index(file)
            problem = problem or found
        except OSError as error:
            raise DataError(f"shard {self.name} cannot be read as a tar ({error}): copy it again") from error
        if problem and (expected is None or not self._table):
            raise DataError(f"shard {self.name} cannot be read as a tar ({problem}): copy it again")
        if not self._table:
            raise DataError(f"shard {self.name} holds no samples: remove it")
        self.damage = problem or self._surplus()

    def __len__(self) -> int:
        return len(self._table) if self._expected is None else self._expected

    @property
    def missing(self) -> int:
        """The number of missing samples."""
        return max(len(self) - len(self._table), 0)

    def key(self, index: int) -> str:
        return self._table[index].key if index < len(self._table) else f"#{index}"

    def __getitem__(self, index: int) -> RawSample:
        if index >= len(self._table):
            raise MissingSampleError(f"it is missing ({self.damage})")
        entry = self._table[index]
        if entry.problem:
            raise BadSampleError(entry.problem)
        data: dict[str, bytes] = {}
        try:
            with self._open() as file:
                for extension, (offset, size) in entry.places.items():
                    file.seek(offset)
                    data[extension] = file.read(size)
        except OSError as error:
            raise DataError(f"shard {self.name} can no longer be read ({error}): check its disk") from error
        return RawSample(self.name, entry.key, data)

    def _open(self) -> BinaryIO:
        return self.path.open("rb") if self._unpacked is None else io.BytesIO(self._unpacked)

    def _index(self, file: BinaryIO) -> str:
        """Fill the table; returns a description of the first damage, or ""."""
        numbers: dict[str, int] = {}
        problem = ""
        for member in read_members(file, incomplete=lambda: len(self._table) < (self._expected or 0)):
            if isinstance(member, Member):
                self._add(member, numbers)
            else:
                problem = problem or _describe(member, len(self._table))
                if self._expected is None:
                    break
        short = len(self._table) < (self._expected or 0)
        return problem or ("samples are missing" if short else "")

    def _add(self, member: Member, numbers: dict[str, int]) -> None:
        name = MEMBER_NAME.fullmatch(member.name)
        if name is None or member.kind is Kind.OTHER:
            return
        key, extension = name[1], name[2].lower()
        if key not in numbers:
            if member.kind is not Kind.PLAIN:
                return  # alone it is not a sample
            numbers[key] = len(self._table)
            self._table.append(_Entry(key))
        if extension in IMAGE_EXTENSIONS + TEXT_EXTENSIONS:
            self._table[numbers[key]].add(extension, member)

    def _surplus(self) -> str:
        surplus = len(self._table) - len(self)
        if surplus <= 0:
            return ""
        self._table.sort(key=lambda entry: not entry.complete)  # fragments of damaged samples come last
        return f"{surplus} samples more than counted: write the manifest again"


def _describe(damage: Damage, samples: int) -> str:
    return f"truncated or damaged after {samples} samples, at byte {damage.offset}: {damage.reason}"


def _unpacked(path: Path) -> tuple[bytes | None, str]:
    """Unpack a gzipped file as far as possible; returns the content and any problem; None for other files."""
    if not path.is_file():  # a folder or a named pipe, which would block for ever
        raise FileNotFoundError(f"No such file, or not a plain file: {path}")
    with path.open("rb") as file:
        if file.read(len(GZIP)) != GZIP:
            return None, ""
    content = bytearray()
    with gzip.open(path) as file:
        try:
            while part := file.read1(1 << 20):  # read1: an error loses at most one chunk
                content += part
                if len(content) > LARGEST_UNPACKED:
                    return bytes(content), f"more than {LARGEST_UNPACKED:,} bytes unpacked"
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            return bytes(content), str(error)
    return bytes(content), ""
