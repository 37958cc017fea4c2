"""Tar shards in img2dataset's layout, indexed for random access.

A shard is a tar whose members KEY.jpg (or png, webp), KEY.txt and KEY.json belong together when they share KEY; what
else stands there is never read. A gzipped shard cannot be read from the middle, so it is unpacked into memory: keep
those small.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data.quarantine import BadSampleError, MissingSampleError
from data.tar import Damage, Member, read_members
from ldm.errors import DataError

# KEY.EXTENSION as webdataset splits it: folders belong to the key, all behind the first dot of the file's name
# to the extension. What has no such name (a README, macOS's ._files) is no sample.
MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")
TEXT_EXTENSIONS = ("txt", "json")
LARGEST_MEMBER = {"txt": 1 << 20, "json": 1 << 20}  # bytes
LARGEST_IMAGE = 64 << 20  # bytes
LARGEST_UNPACKED = 4 << 30  # bytes of a gzipped shard
GZIP = b"\x1f\x8b"


@dataclass(frozen=True, slots=True)
class RawSample:
    """The undecoded members of one sample, by extension ("webp", "txt", "json")."""

    shard: str
    key: str
    members: dict[str, bytes]


@dataclass(slots=True)
class _Entry:
    key: str
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # extension -> offset and size
    problem: str = ""

    @property
    def whole(self) -> bool:
        return not (self.places.keys().isdisjoint(IMAGE_EXTENSIONS) or self.places.keys().isdisjoint(TEXT_EXTENSIONS))

    def add(self, extension: str, member: Member) -> None:
        most = LARGEST_MEMBER.get(extension, LARGEST_IMAGE)
        if member.strange:
            self.problem = f"its {extension} is {member.strange}"
        elif extension in self.places:
            self.problem = f"its {extension} stands there twice"
        elif member.size > most:
            self.problem = f"its {extension} takes {member.size:,} bytes, more than {most:,}"
        self.places[extension] = (member.offset, member.size)


class Shard:
    """One tar file, its member table read once; samples are then read by number.

    expected: how many samples it should hold. Without it, whatever is not whole is refused: what is lost could not be
    counted. With it, all that can be read is read, `damage` says what could not be, and the samples that are missing
    are the last numbers, which raise BadSampleError; samples in excess of it are not reached, and `damage` says so.

    name: what the shard is called where it is spoken of; None: its path.
    Raises DataError if the file is missing or no tar and, without `expected`, if it is damaged or empty.
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
        if expected is None and problem:
            raise DataError(f"shard {self.name} cannot be read as a tar ({problem}): copy it again")
        if not self._table:
            why = f"cannot be read as a tar ({problem}): copy it again" if problem else "holds no samples: remove it"
            raise DataError(f"shard {self.name} {why}")
        self.damage = problem or self._surplus()

    def __len__(self) -> int:
        return len(self._table) if self._expected is None else self._expected

    @property
    def missing(self) -> int:
        """Samples that should be there and are not."""
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
            raise DataError(f"shard {self.name} can no longer be read ({error}): is its disk still there?") from error
        return RawSample(self.name, entry.key, data)

    def _open(self) -> BinaryIO:
        return self.path.open("rb") if self._unpacked is None else io.BytesIO(self._unpacked)

    def _index(self, file: BinaryIO) -> str:
        """Fill the table; returns the first damage, or ""."""
        numbers: dict[str, int] = {}
        problem = ""
        for member in read_members(file, incomplete=lambda: len(self._table) < (self._expected or 0)):
            if isinstance(member, Member):
                self._add(member, numbers)
            else:
                problem = problem or _told(member, len(self._table))
                if self._expected is None:
                    break
        short = len(self._table) < (self._expected or 0)
        return problem or ("samples are missing" if short else "")

    def _add(self, member: Member, numbers: dict[str, int]) -> None:
        name = MEMBER_NAME.fullmatch(member.name)
        if name is None or member.strange == "no plain file":
            return
        key, extension = name[1], name[2].lower()
        if key not in numbers:
            if member.strange:
                return  # alone it makes no sample
            numbers[key] = len(self._table)
            self._table.append(_Entry(key))
        if extension in IMAGE_EXTENSIONS + TEXT_EXTENSIONS:
            self._table[numbers[key]].add(extension, member)

    def _surplus(self) -> str:
        surplus = len(self._table) - len(self)
        if surplus <= 0:
            return ""
        self._table.sort(key=lambda entry: not entry.whole)  # halves that damage has made from one sample come last
        return f"{surplus} samples more than are counted: write the manifest again"


def _told(damage: Damage, samples: int) -> str:
    return f"cut short or damaged after {samples} samples, at byte {damage.offset}: {damage.reason}"


def _unpacked(path: Path) -> tuple[bytes | None, str]:
    """A gzipped file's content as far as it can be unpacked, and what stopped that; None for any other file."""
    if not path.is_file():  # a folder, or a pipe, which would wait for ever
        raise FileNotFoundError(f"No such file, or no plain one: {path}")
    with path.open("rb") as file:
        if file.read(len(GZIP)) != GZIP:
            return None, ""
    content = bytearray()
    with gzip.open(path) as file:
        try:
            while part := file.read1(1 << 20):  # what one call holds: an error costs no more than that
                content += part
                if len(content) > LARGEST_UNPACKED:
                    return bytes(content), f"more than {LARGEST_UNPACKED:,} bytes unpacked"
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            return bytes(content), str(error)
    return bytes(content), ""
