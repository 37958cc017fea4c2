"""The checkpoints of a run: which there are, which can be trusted, which may go."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from ldm.files.atomic import atomic_file, to_disk
from ldm.training.checkpoints.manifest import Digest, fault, seal

NAME = re.compile(r"step_(\d{7,})")
LATEST = "latest"  # a file that names the newest, for people and scripts; what is taken up again is what verifies


class Checkpoints:
    """FOLDER/step_0001000, ...: each appears under its name only when every file of it is on the disk."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._good: set[Path] = set()  # those that this process wrote, or has read whole

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}"

    def all(self) -> list[Path]:
        """Oldest first, by their number, whether good or damaged."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=step_of)

    def trust(self, path: Path) -> None:
        """Remember that all of this checkpoint was found as it was written."""
        self._good.add(path)

    def is_good(self, path: Path) -> bool:
        """Whether a checkpoint is as it was written; all of it is read, once."""
        if path not in self._good and fault(path) is None:
            self._good.add(path)
        return path in self._good

    def commit(self, partial: Path, digests: Mapping[str, Digest]) -> Path:
        """Give a folder whose files are on the disk its manifest and its name, and only then call it the latest."""
        path = partial.with_suffix("")
        seal(partial, digests, name=path.name)
        partial.rename(path)
        to_disk(self.folder)
        self._good.add(path)
        with contextlib.suppress(OSError):  # the checkpoint is there, whatever is said of it
            with atomic_file(self.folder / LATEST) as latest:
                latest.write_text(path.name + "\n")
                to_disk(latest)
            to_disk(self.folder)
        return path

    def prune(self) -> None:
        """Remove what is older than the newest `keep` good ones: if there are fewer, nothing."""
        paths = self.all()
        good = 0
        for number in reversed(range(len(paths))):
            good += self.is_good(paths[number])
            if good == self.keep:
                for path in paths[:number]:
                    with contextlib.suppress(OSError):  # it is only room that is not won
                        remove(path)
                return

    def set_aside(self, path: Path, suffix: str) -> Path:
        """Rename a checkpoint that must not be taken up again: PATH.SUFFIX, with a number if that exists."""
        self._good.discard(path)
        names = [f"{path.name}.{suffix}", *(f"{path.name}.{suffix}-{n}" for n in range(2, 1000))]
        target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
        return path.rename(target)

    def clear(self) -> None:
        """Remove what a save that was cut off, or a removal, has left."""
        for leftover in self.folder.glob("*.partial"):
            with contextlib.suppress(OSError):  # it is only room that is not won
                linked = leftover.is_symlink() or not leftover.is_dir()
                leftover.unlink() if linked else shutil.rmtree(leftover)


def step_of(path: Path) -> int:
    """The number in a checkpoint's name. Raises ValueError if it has none."""
    match = NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint (step_0001000)")
    return int(match[1])


def remove(path: Path) -> None:
    """Remove a checkpoint; cut off in the middle, it is no checkpoint any more."""
    doomed = path.with_name(path.name + ".partial")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)
