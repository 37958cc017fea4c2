"""Manage the checkpoint folders of a run: list, verify, commit, prune and set aside."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from ldm.files.atomic import atomic_file, to_disk
from ldm.training.checkpoints.manifest import Digest, fault, seal

NAME = re.compile(r"step_(\d{7,})")
LATEST = "latest"  # a file that names the newest, for people and scripts; resuming uses the newest that verifies


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
                to_disk(latest)
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
        """Remove the leftovers of interrupted saves and removals."""
        for leftover in self.folder.glob("*.partial"):
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
