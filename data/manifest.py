"""Read and write what shards should hold: manifest.json next to them, {"00000.tar": {"count", "size", "sha256"}}.

    python -m data.manifest FOLDER                            writes FOLDER/manifest.json
    python -m data.manifest "s3://bucket/{00000..00099}.tar" --out manifest.json       for data.manifest

With --out the names in it are full locations. Use it for shards in folders that cannot be written to, and for pipes
(pipe:COMMAND), which have no folder. A sizes.json, {"00000.tar": count}, is read if there is no manifest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from data.fetch import PATIENCE, Absent, Cache, Patience, read_text
from data.not_shards import SUFFIXES, in_place_of_a_folder
from data.shards import Shard
from data.sources import Source, expand, local_glob, short
from ldm.errors import DataError
from ldm.files.atomic import write_atomically
from ldm.files.digest import sha256_of
from ldm.files.paths import user_path

NAME = "manifest.json"
SIZES = "sizes.json"


@dataclass(frozen=True, slots=True)
class Entry:
    """The expected contents of a shard. None: unknown."""

    count: int  # samples
    size: int | None = None  # bytes
    sha256: str | None = None


def entry_of(path: Path) -> Entry:
    """Compute the entry of a valid shard. Raises DataError if the shard is damaged."""
    return Entry(len(Shard(path)), path.stat().st_size, sha256_of(path))


def mismatch(path: Path, entry: Entry) -> str:
    """Describe how a file differs from its entry; "" if it matches."""
    size = path.stat().st_size
    if entry.size is not None and size != entry.size:
        return f"it has {size:,} bytes, the manifest says {entry.size:,}"
    return "its sha256 differs from the manifest's" if entry.sha256 not in (None, sha256_of(path)) else ""


def manifest_text(entries: Mapping[str, Entry]) -> str:
    return json.dumps({name: asdict(entry) for name, entry in entries.items()}, indent=1, sort_keys=True) + "\n"


def entries_for(
    sources: Sequence[Source], *, manifest: str | None = None, patience: Patience = PATIENCE
) -> list[Entry | None]:
    """Look up each shard's entry by location in `manifest`, else in the files next to it; None if missing.

    Raises DataError for a manifest that does not parse or cannot be reached, or if `manifest` does not exist.
    """
    counts = Counts(manifest, patience)
    return [counts.entry(source) for source in sources]


class Counts:
    """What manifests say: one that is named, and those next to shards. Each is read once.

    rewriting: they are about to be replaced, so those that do not parse say nothing. Raises the same errors as
    entries_for.
    """

    def __init__(self, manifest: str | None, patience: Patience = PATIENCE, *, rewriting: bool = False) -> None:
        self._patience, self._rewriting, self._named = patience, rewriting, dict[str, Entry]()
        self._folders: dict[Source | None, dict[str, Entry]] = {None: {}}
        if manifest is not None:
            source = Source(str(user_path(manifest)) if Source(manifest).is_local else manifest)
            named = _read(source, patience)
            if named is None:
                raise DataError(f"data.manifest: {source.shown} is missing: write it with python -m data.manifest")
            self._named = named

    def entry(self, source: Source) -> Entry | None:
        return self._named.get(source.location) or self._beside(source).get(source.name)

    def matching(self, pattern: str) -> list[str]:
        """List the locations of shards that are counted and that a path or a glob matches."""
        found = [location for location in self._named if _matches(location, pattern)]
        folder, slash, name = pattern.rpartition("/")
        folders = (local_glob(folder) if folder else [""]) if Source(pattern).is_local else [folder]
        for one in folders:
            start = f"{one}{slash}"
            found += [start + known for known in self._beside(Source(start + name)) if _matches(known, name)]
        return found

    def _beside(self, source: Source) -> dict[str, Entry]:
        """Read the files in a shard's folder: manifest.json and, for what it does not count, sizes.json."""
        place = source.beside(NAME)
        if place not in self._folders:
            found = [self._read(one) for one in (source.beside(SIZES), place) if one is not None]
            self._folders[place] = {name: entry for own in found for name, entry in own.items()}
        return self._folders[place]

    def _read(self, place: Source) -> dict[str, Entry]:
        try:
            return _read(place, self._patience) or {}
        except DataError:
            if self._rewriting:
                return {}
            raise


def _matches(location: str, pattern: str) -> bool:
    """Whether a glob matches, part by part of a path: * matches no slash."""
    parts, patterns = location.split("/"), pattern.split("/")
    return location == pattern or (
        len(parts) == len(patterns) and all(fnmatchcase(part, own) for part, own in zip(parts, patterns, strict=True))
    )


def _read(source: Source, patience: Patience) -> dict[str, Entry] | None:
    text = read_text(source, patience)
    if text is None:
        return None
    try:
        return {name: _parsed(value) for name, value in json.loads(text).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{source.shown} is not a JSON object of shards ({short(error)}): write it with python -m data.manifest"
        ) from error


def _parsed(value: Any) -> Entry:
    entry = Entry(value) if isinstance(value, int) else Entry(**value)
    types = (type(entry.count), type(entry.size), type(entry.sha256))
    if types[0] is not int or types[1] not in (int, type(None)) or types[2] not in (str, type(None)) or entry.count < 0:
        raise ValueError(f"{value!r} is neither a number of samples nor count, size and sha256")
    return entry


def write(sources: Iterable[Source], out: Path | None, before: Counts) -> list[str]:
    """Write the manifests of these shards; returns an error line for each invalid one, which is left out.

    Absent shards, among them those that the manifests until now (before) count, are left out with a warning; empty
    ones are counted with 0 samples.
    """
    from tqdm import tqdm

    entries: dict[Path, dict[str, Entry]] = {}
    failed: list[str] = []
    with tqdm(list(sources), unit="shard", disable=None) as progress:
        for source in progress:
            place = out or _adjacent(source)
            if source.absent:
                entry = before.entry(source)
                lost = "" if entry is None else f", and had {entry.count:,} samples by the manifest until now"
                print(f"warning: {source.shown} is missing{lost}: it is left out", file=sys.stderr)
                continue
            try:
                entry = _entry_at(source)
                entries.setdefault(place, {})[source.location if out else source.name] = entry
                if not entry.count:
                    print(f"warning: {source.shown} holds no samples", file=sys.stderr)
            except (DataError, Absent) as error:
                failed.append(short(error))
    for place, own in entries.items():
        write_atomically(place, manifest_text(own).encode())
        print(f"{place}: {len(own)} shards, {sum(entry.count for entry in own.values())} samples")
    return failed


def _adjacent(source: Source) -> Path:
    if not source.is_local:
        raise ValueError(f"no file can be written next to {source.shown}: give --out FILE and set data.manifest to it")
    return Path(source.location).parent / NAME


def _entry_at(source: Source) -> Entry:
    if source.is_local:
        return entry_of(Path(source.location))
    copies = Cache(None, most=0, keep=1)
    return entry_of(copies.get(source))


def _named(shards: Sequence[str], counts: Counts) -> list[Source]:
    """List the shards in folders, and those that patterns name, also if they are absent."""
    found: list[Source] = []
    for pattern in shards:
        folder = user_path(pattern)
        if folder.is_dir() and Source(pattern).is_local:
            suffixes = [suffix for suffix in SUFFIXES if any(folder.glob(suffix))]
            if not suffixes:
                raise DataError(f"{folder} {in_place_of_a_folder(folder)}")
            found += expand([f"{folder}/{suffix}" for suffix in suffixes], counted=counts.matching)
        else:  # a command typed here is intended
            found += expand(pattern, allow_pipe=True, counted=counts.matching, gaps=True)
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.manifest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="+", help="folders, or patterns as in data.shards")
    parser.add_argument("--out", type=Path, help="one file for all of them, with full locations as names")
    args = parser.parse_args(words)
    try:
        before = Counts(None, rewriting=True)
        failed = write(_named(args.shards, before), None if args.out is None else user_path(args.out), before)
    except (ValueError, OSError, DataError) as error:
        print(f"error: {short(error)}", file=sys.stderr)
        return 3 if isinstance(error, DataError) else 2
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
