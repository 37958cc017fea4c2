"""Seal a folder with the SHA-256 of its files and verify it: formats of weights do not detect a flipped bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm.files.atomic import to_disk
from ldm.files.digest import sha256_of

MANIFEST = "manifest.json"


class Digest(NamedTuple):
    size: int  # bytes
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Digest:
        return cls(path.stat().st_size, sha256_of(path))


def write_json(path: Path, value: Any) -> Digest:
    """Write a JSON file and wait until it is on the disk."""
    path.write_text(_text(value))
    to_disk(path)
    return Digest.of(path)


def seal(folder: Path, digests: Mapping[str, Digest], *, name: str) -> None:
    """Write the manifest of a folder whose files are all on the disk; from then on `fault` detects any change.

    digests: of every file as written, by name. name: the final name of the folder.
    """
    listed = {"name": name, "files": {file: digests[file]._asdict() for file in sorted(digests)}}
    write_json(folder / MANIFEST, listed | {"sha256": _of_list(listed)})
    to_disk(folder)


def sealed(folder: Path) -> dict[str, Digest]:
    """Read the digests that a folder was sealed with. Raises ValueError, naming the fault, if they are not valid."""
    try:
        written = (folder / MANIFEST).read_bytes()
        listed = json.loads(written)
        intact = written == _text(listed).encode() and not (folder / MANIFEST).is_symlink()
        digest, name = listed.pop("sha256"), listed["name"]
        files = {str(file): Digest(int(d["size"]), str(d["sha256"])) for file, d in listed["files"].items()}
    except FileNotFoundError as error:
        raise ValueError(f"{MANIFEST} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged") from error
    if not intact or digest != _of_list(listed):
        raise ValueError(f"{MANIFEST} is damaged: its content differs from what was written")
    if name != folder.name:
        raise ValueError(f"it was written as {name}")
    return files


def fault(folder: Path, *, part: int = 0, parts: int = 1) -> str | None:
    """Verify a sealed folder; returns the file, what was found and what was expected, or None if it is valid.

    Rank `part` of `parts` reads the content of every parts-th file only: together the ranks read all files.
    """
    try:
        expected = sealed(folder)
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
    except (ValueError, OSError) as error:
        return str(error)
    if present != expected.keys():
        missing, stray = sorted(expected.keys() - present), sorted(present - expected.keys())
        return f"{missing[0]} is missing" if missing else f"{stray[0]} does not belong there"
    for name in sorted(expected)[part::parts]:
        wrong = _wrong(folder / name, expected[name])
        if wrong is not None:
            return wrong
    return None


def _wrong(path: Path, expected: Digest) -> str | None:
    try:
        if path.is_symlink() or not path.is_file():
            return f"{path.name} is not a plain file"
        size = path.stat().st_size
        if size != expected.size:
            return f"{path.name} has {size} bytes, expected {expected.size}"
        found = Digest.of(path).sha256
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    if found != expected.sha256:
        return f"{path.name} has sha256 {found[:12]}, expected {expected.sha256[:12]}"
    return None


def _text(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _of_list(listed: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
