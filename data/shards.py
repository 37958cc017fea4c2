"""Index tar shards in img2dataset's layout for random access.

A shard is a tar in which KEY.jpg (or another ending of data.pictures.EXTENSIONS), KEY.txt and KEY.json with the same
KEY form a sample (or what SampleConfig names instead); other members are never read. A gzipped shard has no random
access, so it is unpacked into memory: keep those small.
"""

from __future__ import annotations

import gzip
import io
import re
import sys
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data.config import SampleConfig
from data.not_shards import COPY_AGAIN, described, unreadable
from data.pictures import EXTENSIONS as IMAGE_EXTENSIONS
from data.tar import Damage, Kind, Member, read_members
from ldm.errors import DataError
from ldm.files.messages import SHOWN, printable, some

# KEY.EXTENSION as webdataset splits it: folders belong to the key, all after the first dot of the file name to the
# extension. Members with other names (a README, macOS's ._files) are not samples.
MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")
LARGEST_TEXT = 1 << 20  # bytes
LARGEST_IMAGE = 64 << 20  # bytes
LARGEST_UNPACKED = 4 << 30  # bytes of a gzipped shard
GZIP = b"\x1f\x8b"
USUAL = SampleConfig()


class BadSampleError(Exception):
    """A sample cannot be used, for the reason in the message; the loader turns it into a BadSample."""


class MissingSampleError(BadSampleError):
    """A sample is missing from its shard."""


@dataclass(frozen=True, slots=True)
class RawSample:
    """The undecoded members of one sample, by extension ("webp", "txt", "json")."""

    shard: str
    key: str
    members: Mapping[str, bytes]
    faults: Mapping[str, str] = field(default_factory=dict[str, str])  # members that are not read, and why
    others: Sequence[str] = ()  # extensions of further members, which nobody asked for
    image_keys: Sequence[str] = IMAGE_EXTENSIONS  # extensions of pictures, in order of preference

    @property
    def endings(self) -> set[str]:
        return {*self.members, *self.faults, *self.others}

    @property
    def listed(self) -> str:
        """The extensions of its members, for a message."""
        return some(self.endings) or "none"

    @property
    def picture(self) -> bytes:
        """The encoded picture. Raises BadSampleError if there is none that can be read."""
        for key in self.image_keys:
            if key in self.members:
                return self.members[key]
        for key in self.image_keys:
            if key in self.faults:
                raise BadSampleError(self.faults[key])
        raise BadSampleError(f"no image among its members ({self.listed}: data.image_keys names others)")


def caption_place(name: str, endings: Collection[str]) -> tuple[str, list[str]]:
    """Locate one of data.caption_keys: the extension of a member and, within a json, the path of keys.

    endings: of the sample's members. For example txt -> (txt, []), json.captions.en -> (json, [captions, en]); a name
    that no member has is a path in the json.
    """
    parts = name.strip(".").split(".")
    lower = [part.lower() for part in parts]
    if "json" in lower:
        at = lower.index("json") + 1
        return ".".join(lower[:at]), parts[at:]
    whole = ".".join(lower)
    return (whole, []) if whole in endings or whole == "txt" else ("json", parts)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The extensions of the members that are read."""

    images: tuple[str, ...]
    texts: frozenset[str]

    @classmethod
    def of(cls, config: SampleConfig) -> _Wanted:
        names = [name.strip(".").lower() for name in config.caption_keys]
        texts = {caption_place(name, names)[0] for name in names}
        images = tuple(key.strip(".").lower() for key in config.image_keys)
        return cls(images or IMAGE_EXTENSIONS, frozenset(texts | {"json"}))


@dataclass(slots=True)
class _Entry:
    key: str
    # extension -> offset and size
    places: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    faults: dict[str, str] | None = None
    others: tuple[str, ...] = ()

    def complete(self, wanted: _Wanted) -> bool:
        return not (self.places.keys().isdisjoint(wanted.images) or self.places.keys().isdisjoint(wanted.texts))

    def add(self, extension: str, member: Member, wanted: _Wanted) -> None:
        if extension not in wanted.images and extension not in wanted.texts:
            self.others = (*self.others, sys.intern(extension))
            return
        most = LARGEST_IMAGE if extension in wanted.images else LARGEST_TEXT
        problem = ""
        if member.kind is not Kind.PLAIN:
            problem = f"its {extension} is {member.kind.value}"
        elif extension in self.places:
            problem = f"its {extension} occurs twice"
        elif member.size > most:
            problem = f"its {extension} has {member.size:,} bytes, more than {most:,}"
        if problem:
            self.faults = (self.faults or {}) | {extension: problem}
        self.places[extension] = (member.offset, member.size)


class Shard:
    """One tar file. Its member table is read once; samples are then read by number.

    expected: the number of samples. Without it, a damaged shard is refused, because the loss could not be counted. With
    it, all readable samples are read and `damage` describes the rest: missing samples have the last numbers, which
    raise BadSampleError; surplus samples are out of reach. Without it, a shard may be empty: see `emptiness`.

    name: the shard's name in messages; None: its path. samples: which members are read.
    Raises DataError if the file is missing or not a tar and, without `expected`, if it is damaged.
    """

    def __init__(
        self, path: Path, *, expected: int | None = None, name: str | None = None, samples: SampleConfig = USUAL
    ) -> None:
        self.path, self.name, self.damage = path, name or str(path), ""
        self._expected, self._wanted = expected, _Wanted.of(samples)
        self._table: list[_Entry] = []
        self._strangers: list[str] = []  # the names of the first members that are no sample's
        try:
            self._unpacked, problem = _unpacked(path)
            with self._open() as file:
                found = self._index(file)
            problem = problem or found
        except OSError as error:
            raise DataError(f"shard {self.name} {unreadable(path, error)}") from error
        if problem and (expected is None or not self._table):
            what, remedy = described(path, problem) if not self._table else (problem, COPY_AGAIN)
            raise DataError(f"shard {self.name} cannot be read as a tar ({what}): {remedy}")
        if expected and not self._table:
            raise DataError(f"shard {self.name} {self.emptiness}, expected {expected}: {COPY_AGAIN}")
        self.damage = problem or self._surplus()

    @property
    def emptiness(self) -> str:
        """Describe a shard without samples."""
        held = f" (its members are {', '.join(self._strangers)})" if self._strangers else ""
        return f"holds no samples{held}"

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
        faults, data = entry.faults or {}, dict[str, bytes]()
        try:
            with self._open() as file:
                for extension, (offset, size) in entry.places.items():
                    if extension not in faults:
                        file.seek(offset)
                        data[extension] = file.read(size)
        except OSError as error:
            raise DataError(f"shard {self.name} can no longer be read ({error}): check its disk") from error
        return RawSample(self.name, entry.key, data, faults, entry.others, self._wanted.images)

    def _open(self) -> BinaryIO:
        return self.path.open("rb") if self._unpacked is None else io.BytesIO(self._unpacked)

    def _index(self, file: BinaryIO) -> str:
        """Fill the table; returns a description of the first damage, or ""."""
        if not file.read(1) and not self._expected:
            return ""  # no byte at all: empty rather than damaged
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
            if len(self._strangers) < SHOWN:
                self._strangers.append(printable(member.name))
            return
        key, extension = name[1], name[2].lower()
        if key not in numbers:
            if member.kind is not Kind.PLAIN:
                return  # alone it is not a sample
            numbers[key] = len(self._table)
            self._table.append(_Entry(key))
        self._table[numbers[key]].add(extension, member, self._wanted)

    def _surplus(self) -> str:
        surplus = len(self._table) - len(self)
        if surplus <= 0:
            return ""
        self._table.sort(key=lambda entry: not entry.complete(self._wanted))  # fragments of damaged samples come last
        return f"{surplus} samples more than counted: write the manifest again"


def _describe(damage: Damage, samples: int) -> str:
    return f"truncated or damaged after {samples} samples, at byte {damage.offset}: {damage.reason}"


def _unpacked(path: Path) -> tuple[bytes | None, str]:
    """Unpack a gzipped file as far as possible; returns the content and any problem; None for other files."""
    if not path.is_file():  # a folder or a named pipe, which would block for ever
        raise FileNotFoundError(f"No such file: {path}")
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
