"""Manage the checkpoint folders of a run: seal, verify, list, commit, prune and set aside.

A folder is sealed with the SHA-256 of its files, because formats of weights do not detect a flipped bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldm.files.atomic import PARTIAL, atomic_file, is_temporary, to_disk
from ldm.files.digest import sha256_of

MANIFEST = "manifest.json"
STATE = "state.json"  # what a checkpoint records besides tensors
NAME = re.compile(r"step_(\d{7,})")
LATEST = "latest"  # a file that names the newest, for people and scripts; resuming uses the newest that verifies


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


class Checkpoints:
    """The checkpoints FOLDER/step_0001000, ... Each gets its name only when all of its files are on the disk."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._good: set[Path] = set()  # those that this process has written or verified

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}"

    def all(self) -> list[Path]:
        """List all checkpoints, good or damaged, by step, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=step_of)

    def trust(self, path: Path) -> None:
        """Mark a checkpoint as verified."""
        self._good.add(path)

    def is_good(self, path: Path) -> bool:
        """Verify a checkpoint; all of its files are read, but only once per process."""
        if path not in self._good and fault(path) is None:
            self._good.add(path)
        return path in self._good

    def commit(self, partial: Path, digests: Mapping[str, Digest]) -> Path:
        """Write the manifest of a folder whose files are on the disk, rename it into place, and update `latest`."""
        path = partial.with_suffix("")
        seal(partial, digests, name=path.name)
        partial.rename(path)
        to_disk(self.folder)
        self._good.add(path)
        with contextlib.suppress(OSError):  # best effort: the checkpoint itself is already safe
            with atomic_file(self.folder / LATEST) as latest:
                latest.write_text(path.name + "\n")
            to_disk(self.folder)
        return path

    def prune(self) -> None:
        """Remove the checkpoints older than the newest `keep` good ones. With fewer good ones, remove nothing."""
        paths = self.all()
        good = 0
        for number in reversed(range(len(paths))):
            good += self.is_good(paths[number])
            if good == self.keep:
                for path in paths[:number]:
                    with contextlib.suppress(OSError):  # best effort: only disk space is lost
                        remove(path)
                return

    def set_aside(self, path: Path, suffix: str) -> Path:
        """Rename a checkpoint that must not be resumed to PATH.SUFFIX, or PATH.SUFFIX-N if that exists."""
        self._good.discard(path)
        names = [f"{path.name}.{suffix}", *(f"{path.name}.{suffix}-{n}" for n in range(2, 1000))]
        target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
        return path.rename(target)

    def clear(self) -> None:
        """Remove the leftovers of interrupted saves and removals, which have the names of checkpoints."""
        for leftover in self.folder.glob(f"*{PARTIAL}"):
            if NAME.fullmatch(leftover.name.removesuffix(PARTIAL)) or is_temporary(leftover.name, LATEST):
                with contextlib.suppress(OSError):  # best effort: only disk space is lost
                    linked = leftover.is_symlink() or not leftover.is_dir()
                    leftover.unlink() if linked else shutil.rmtree(leftover)


def step_of(path: Path) -> int:
    """Parse the step from a checkpoint's name. Raises ValueError for any other name."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint (step_0001000)")
    return int(match[1])


def remove(path: Path) -> None:
    """Remove a checkpoint. It is renamed first: after an interruption, no partial checkpoint keeps the name."""
    doomed = path.with_name(path.name + ".partial")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)
