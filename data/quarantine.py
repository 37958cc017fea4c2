"""Samples that cannot be used: what is told of each, and the list of them that a run keeps."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from ldm.files.messages import printable

LONGEST = 1000  # characters of a line


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that cannot be used: what a person needs to find it and mend it."""

    shard: str
    key: str  # or #NUMBER in its shard, where the sample itself is lost
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.key} in {self.shard}: {self.reason}", LONGEST)


class BadSampleError(Exception):
    """Carries the reason; the loader turns it into a BadSample."""


class MissingSampleError(BadSampleError):
    """A sample that should be in its shard, and is not."""


class Quarantine:
    """A list of bad samples as lines of JSON, {"shard", "key", "reason"}, in a file that appears with the first.

    Each is written once, however often a run is resumed. Ranks never write one file: rank 0 writes `path`, rank 3
    writes bad_samples.rank3.jsonl beside bad_samples.jsonl. May be used by several threads.
    """

    def __init__(self, path: Path, *, rank: int = 0) -> None:
        self.path = path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
        self._written: set[str] | None = None
        self._writing = threading.Lock()

    def add(self, bad: BadSample) -> None:
        line = json.dumps(asdict(bad))  # ASCII: keys may hold bytes that are no text
        with self._writing:
            try:
                if self._written is None:
                    self._written = self._read()
                if line not in self._written:
                    with self.path.open("a", encoding="ascii") as file:
                        file.write(line + "\n")
                    self._written.add(line)
            except OSError as error:  # the list is a report: a full disk must not end the run for it
                print(f"{self.path} cannot be written ({error}): not listed there: {bad}", flush=True)

    def _read(self) -> set[str]:
        """What earlier processes have written. A last line that was cut off is ended, so that the next is whole."""
        text = self.path.read_text(encoding="ascii", errors="replace") if self.path.exists() else ""
        if text and not text.endswith("\n"):
            with self.path.open("a", encoding="ascii") as file:
                file.write("\n")
        return set(text.splitlines())
