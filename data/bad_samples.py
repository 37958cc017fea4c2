"""Bad samples: list them, and detect when they are too many."""

from __future__ import annotations

import json
import threading
from collections import Counter, deque
from dataclasses import asdict, dataclass
from pathlib import Path

from ldm.files.messages import printable

WINDOW = 10_000  # visits
FEWEST_VISITS = 100  # before any fraction is judged
FEWEST_BAD = 10  # distinct samples: one bad sample in a small set is not an error
LONGEST = 1000  # characters of a line


class BadShare:
    """The fraction of bad samples among the distinct samples of the last 10,000 visits."""

    def __init__(self) -> None:
        self._visits: deque[tuple[tuple[int, int], bool]] = deque()
        self._seen: Counter[tuple[int, int]] = Counter()
        self._bad: Counter[tuple[int, int]] = Counter()

    def record(self, sample: tuple[int, int], *, is_bad: bool) -> None:
        self._visits.append((sample, is_bad))
        self._seen[sample] += 1
        if is_bad:
            self._bad[sample] += 1
        if len(self._visits) > WINDOW:
            oldest, was_bad = self._visits.popleft()
            for counts in (self._seen, self._bad) if was_bad else (self._seen,):
                counts[oldest] -= 1
                if not counts[oldest]:
                    del counts[oldest]

    def above(self, most: float) -> tuple[int, int] | None:
        """Return (bad, seen) if more than the fraction `most` is bad and there are enough to judge, else None."""
        bad, seen = len(self._bad), len(self._seen)
        enough = len(self._visits) >= FEWEST_VISITS and bad >= FEWEST_BAD
        return (bad, seen) if enough and bad > most * seen else None


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that cannot be used, with what a user needs to find and repair it."""

    shard: str
    key: str  # or #NUMBER in its shard, if the sample itself is missing
    reason: str

    def __str__(self) -> str:
        return printable(f"{self.key} in {self.shard}: {self.reason}", LONGEST)


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
