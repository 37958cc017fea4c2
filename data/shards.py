"""Tar shards in img2dataset's layout, indexed for random access.

A shard is a tar whose members KEY.jpg (or png, webp), KEY.txt and KEY.json belong together when they
share KEY. Beside the shards stands sizes.json, {"00000.tar": number of samples}.
A gzipped shard cannot be read from the middle, so it is unpacked into memory: keep those small.
"""

from __future__ import annotations

import glob
import gzip
import io
import json
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data import DataError

# KEY.EXTENSION as webdataset splits it: folders belong to the key, all behind the first dot of the file's name
# to the extension. What has no such name (a README, macOS's ._files) is no sample.
MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")


@dataclass(frozen=True, slots=True)
class RawSample:
    """The undecoded members of one sample, by extension ("webp", "txt", "json")."""

    shard: str
    key: str
    members: dict[str, bytes]


def expand_shards(patterns: str | Sequence[str]) -> list[Path]:
    """Paths named by brace ranges ("{00000..00007}.tar"), globs or a list of either, in a fixed order.

    Raises DataError for a pattern that names no file.
    """
    import braceexpand

    paths: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in braceexpand.braceexpand(pattern):
            found = sorted(glob.glob(name))
            if not found:
                raise DataError(f"no shard matches {name!r} (from {pattern!r}): give paths of .tar files")
            paths.extend(Path(path) for path in found)
    return paths


class Shard:
    """One tar file, its member table read once; samples are then read by number.

    Raises DataError if the file is missing, not a tar, cut short, or disagrees with sizes.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._table: list[tuple[str, dict[str, tuple[int, int]]]] = []  # (key, {extension: (offset, size)})
        places: dict[str, int] = {}
        try:
            self._unpacked = gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".tgz") else None
            with self._open() as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    name = MEMBER_NAME.fullmatch(member.name)
                    if member.isfile() and name is not None:
                        key, extension = name.groups()
                        if key not in places:
                            places[key] = len(self._table)
                            self._table.append((key, {}))
                        self._table[places[key]][1][extension.lower()] = (member.offset_data, member.size)
                # tarfile takes a header that is cut or damaged for the end, so see whether the end stands there.
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"cut short or damaged after {len(self._table)} samples")
        except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
            raise DataError(f"shard {path} cannot be read as a tar ({error}): copy it again") from error
        self._check_count()

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> RawSample:
        key, members = self._table[index]
        data: dict[str, bytes] = {}
        try:
            with self._open() as file:
                for extension, (offset, size) in members.items():
                    file.seek(offset)
                    data[extension] = file.read(size)
        except OSError as error:
            raise DataError(f"shard {self.path} can no longer be read ({error}): is its disk still there?") from error
        return RawSample(str(self.path), key, data)

    def _open(self) -> BinaryIO:
        return self.path.open("rb") if self._unpacked is None else io.BytesIO(self._unpacked)

    def _check_count(self) -> None:
        sizes = self.path.parent / "sizes.json"
        try:
            expected = json.loads(sizes.read_text()).get(self.path.name) if sizes.exists() else None
        except (ValueError, AttributeError) as error:
            raise DataError(f"{sizes} is no JSON object of sizes ({error}): copy it again, or remove it") from error
        if expected is not None and expected != len(self):
            raise DataError(f"shard {self.path} holds {len(self)} samples, sizes.json says {expected}: copy it again")
        if not self._table:
            raise DataError(f"shard {self.path} holds no samples: remove it from the list")
