"""Describe samples that cannot be used, and list them in a file of the run."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from ldm.files.messages import printable

LONGEST = 1000  # characters of a line


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that cannot be used, with what a user needs to find and repair it."""

    shard: str
    key: str  # or #NUMBER in its shard, if the sample itself is missing
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.key} in {self.shard}: {self.reason}", LONGEST)


class BadSampleError(Exception):
    """A sample cannot be used, for the reason in the message; the loader turns it into a BadSample."""


class MissingSampleError(BadSampleError):
    """A sample is missing from its shard."""


class Quarantine:
    """A list of bad samples as JSON lines, {"shard", "key", "reason"}, in a file created with the first entry.

    Each is written once, even if a run is resumed several times. Each rank has its own file: rank 0 writes `path`,
    rank 3 writes bad_samples.rank3.jsonl next to bad_samples.jsonl. Thread-safe.
    """

    def __init__(self, path: Path, *, rank: int = 0) -> None:
        self.path = path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
        self._written: set[str] | None = None
        self._writing = threading.Lock()

    def add(self, bad: BadSample) -> None:
        line = json.dumps(asdict(bad))  # ASCII: keys may contain bytes that are not valid text
        with self._writing:
            try:
                if self._written is None:
                    self._written = self._read()
                if line not in self._written:
                    with self.path.open("a", encoding="ascii") as file:
                        file.write(line + "\n")
                    self._written.add(line)
            except OSError as error:  # only a report: a full disk must not stop the run
                print(f"{self.path} cannot be written ({error}): not listed there: {bad}", flush=True)

    def _read(self) -> set[str]:
        """Read the lines of earlier processes. A truncated last line is terminated, so that the next stays intact."""
        text = self.path.read_text(encoding="ascii", errors="replace") if self.path.exists() else ""
        if text and not text.endswith("\n"):
            with self.path.open("a", encoding="ascii") as file:
                file.write("\n")
        return set(text.splitlines())
