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
from functools import cache
from pathlib import Path
from typing import Any

from data.fetch import PATIENCE, Absent, Cache, Patience, read_text
from data.shards import Shard
from data.sources import Source, expand, short
from ldm.errors import DataError
from ldm.files.atomic import write_atomically
from ldm.files.digest import sha256_of

NAME = "manifest.json"
SIZES = "sizes.json"
SUFFIXES = ("*.tar", "*.tar.gz", "*.tgz")


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
    named = None if manifest is None else _read(Source(manifest), patience)
    if manifest is not None and named is None:
        shown = Source(manifest).shown
        raise DataError(f"data.manifest: {shown} is missing: write it with python -m data.manifest")

    @cache  # each folder's files are read once
    def adjacent(sizes: Source | None, manifest: Source | None) -> dict[str, Entry]:
        found = [_read(place, patience) or {} for place in (sizes, manifest) if place is not None]
        return {name: entry for own in found for name, entry in own.items()}

    return [
        (named or {}).get(source.location) or adjacent(source.beside(SIZES), source.beside(NAME)).get(source.name)
        for source in sources
    ]


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


def write(sources: Iterable[Source], out: Path | None) -> list[str]:
    """Write the manifests of these shards; returns an error line for each invalid one, which is left out."""
    from tqdm import tqdm

    entries: dict[Path, dict[str, Entry]] = {}
    failed: list[str] = []
    with tqdm(list(sources), unit="shard", disable=None) as progress:
        for source in progress:
            try:
                place = out or _adjacent(source)
                entries.setdefault(place, {})[source.location if out else source.name] = _entry_at(source)
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


def _suffixes(folder: Path) -> list[str]:
    return [suffix for suffix in SUFFIXES if any(folder.glob(suffix))] or [SUFFIXES[0]]  # the pattern for the error


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.manifest", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", nargs="+", help="folders, or patterns as in data.shards")
    parser.add_argument("--out", type=Path, help="one file for all of them, with full locations as names")
    args = parser.parse_args(words)
    try:
        sources: list[Source] = []
        for pattern in args.shards:
            if Path(pattern).is_dir():
                sources += expand([str(Path(pattern) / suffix) for suffix in _suffixes(Path(pattern))])
            else:
                sources += expand(pattern, allow_pipe=True)  # a command typed here is intended
        failed = write(sources, args.out)
    except (ValueError, OSError, DataError) as error:
        print(f"error: {short(error)}", file=sys.stderr)
        return 3 if isinstance(error, DataError) else 2
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 3 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
