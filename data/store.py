"""Open shards on demand by number, keep the last used ones open, and prepare the next in the background."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from data.config import ReadingConfig, SampleConfig
from data.fetch import PATIENCE, Absent, Cache, Patience
from data.manifest import Entry, entries_for, mismatch
from data.shards import USUAL, RawSample, Shard
from data.sources import Source, short
from ldm.errors import DataError
from ldm.files.paths import user_path

AHEAD = 2  # shards made ready at once in the background


class ShardStore:
    """The shards of several sources. Those counted by a manifest or sizes.json are opened on first use.

    Other local shards are opened at once to count their samples. A damaged shard is read as far as possible; an
    unreadable one raises DataError at each use, until `keep` others have been opened.

    keep: how many are kept open; keep_copies: the minimum number of copies of remote shards to keep. on_damage(line):
    called once for each shard that differs from its manifest. samples: what makes a sample. Absent and empty shards
    that nothing counts have size 0.
    Raises DataError for a remote shard that no manifest counts, and if counting fails.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        config: ReadingConfig,
        *,
        keep: int,
        keep_copies: int,
        on_damage: Callable[[str], None],
        patience: Patience = PATIENCE,
        samples: SampleConfig = USUAL,
    ) -> None:
        self._samples = samples
        self.sources, self.keep, self.on_damage = list(sources), keep, on_damage
        self.absent = {number for number, source in enumerate(self.sources) if source.absent}  # at the start
        self._open: OrderedDict[int, Future[Shard]] = OrderedDict()  # most recently used last
        self._begun: set[int] = set()  # prepared, or being prepared, until dropped
        self._verified: set[int] = set()
        self._lock = threading.Lock()
        self._making_ready = threading.BoundedSemaphore(AHEAD)
        self._cache: Cache | None = None
        self._tries = patience.tries
        entries = entries_for(self.sources, manifest=config.manifest, patience=patience)
        if not all(source.is_local for source in self.sources):
            folder = user_path(config.cache) if config.cache is not None else None
            self._cache = Cache(folder, most=int(config.cache_gb * 1e9), keep=keep_copies, patience=patience)
        self.empty: dict[int, str] = {}  # shards without samples, and what they are
        self._entries = [entry or self._counted(number) for number, entry in enumerate(entries)]
        self.sizes = [entry.count for entry in self._entries]
        for number, source in enumerate(self.sources):
            if not self.sizes[number] and not source.absent:
                self.empty.setdefault(number, "holds no samples, as its manifest says")

    @property
    def contents(self) -> str | None:
        """Digest of the SHA-256s of all shards with samples from their manifests; None if any is missing."""
        digests = [entry.sha256 for entry in self._entries if entry.count]
        return None if None in digests else hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def __getitem__(self, number: int) -> Shard:
        """Return the shard, waiting until it is open. Raises DataError if it cannot be read at all."""
        future, mine = self._reserve(number)
        if mine:
            self._fulfil(number, future)
        return future.result()

    def read(self, number: int, index: int) -> RawSample:
        """Read a sample. Raises DataError if the shard cannot be read, BadSampleError if only the sample cannot."""
        shard = self[number]
        try:
            return shard[index]
        except DataError:
            self.forget(number)  # its copy may have been removed from the cache: fetch it again
            return self[number][index]

    def key(self, number: int, index: int) -> str:
        """Return the sample's key, or #NUMBER if it is missing."""
        try:
            return self[number].key(index)
        except DataError:
            return f"#{index}"

    def present(self, number: int) -> int:
        """Count the samples present in a shard."""
        try:
            return self.sizes[number] - self[number].missing
        except DataError:
            return 0

    def make_ready(self, number: int) -> None:
        """Start opening a shard in the background, unless already started. A later use retries failures."""
        with self._lock:
            if number in self._open or number in self._begun:
                return
            self._begun.add(number)
        threading.Thread(target=self._make_ready, args=(number,), daemon=True, name="make-ready").start()

    def forget(self, number: int) -> None:
        """Drop a shard, so that its next use opens it again."""
        with self._lock:
            self._drop(number)

    def _drop(self, number: int) -> None:
        self._open.pop(number, None)
        self._begun.discard(number)

    def _make_ready(self, number: int) -> None:
        with self._making_ready:
            future, mine = self._reserve(number)
            if mine:
                self._fulfil(number, future)
                if future.exception() is not None:
                    with self._lock:
                        self._open.pop(number, None)  # it stays in _begun: only an actual use retries

    def _reserve(self, number: int) -> tuple[Future[Shard], bool]:
        """Return the shard's future, and whether the caller must fulfil it."""
        with self._lock:
            future = self._open.get(number)
            mine = future is None
            if future is None:
                future = self._open[number] = Future()
                for other in [one for one, held in self._open.items() if held.done()]:
                    if len(self._open) <= self.keep:
                        break
                    self._drop(other)
            self._open.move_to_end(number)
            return future, mine

    def _fulfil(self, number: int, future: Future[Shard]) -> None:
        source = self.sources[number]
        try:
            future.set_result(self._opened(source, number))
        except (Absent, OSError) as error:
            future.set_exception(DataError(f"shard {source.shown} cannot be read ({short(error)}): copy it again"))
        except BaseException as error:
            future.set_exception(error)

    def _opened(self, source: Source, number: int) -> Shard:
        entry = self._entries[number]
        path, problem = self._verified_path(source, number, entry)
        shard = Shard(path, expected=entry.count, name=source.shown, samples=self._samples)
        # Once per process, even if the shard is opened again.
        if (problem or shard.damage) and number not in self._verified:
            self.on_damage(f"shard {shard.name}: {'; '.join(filter(None, (problem, shard.damage)))}")
        self._verified.add(number)
        return shard

    def _verified_path(self, source: Source, number: int, entry: Entry) -> tuple[Path, str]:
        """Return the shard's path, and its mismatch with the manifest, if any remains after all tries."""
        path, problem = Path(source.location), ""
        for _ in range(1 if self._cache is None or source.is_local else self._tries):
            if self._cache is not None and not source.is_local:
                if problem:
                    self._cache.drop(source)  # it may have been corrupted in transfer
                fresh = not self._cache.path(source).exists()
                path = self._cache.get(source, entry.size)
                if fresh:
                    self._verified.discard(number)
            problem = "" if number in self._verified else mismatch(path, entry)
            if not problem:
                break
        return path, problem

    def _counted(self, number: int) -> Entry:
        source = self.sources[number]
        if source.absent:
            return Entry(0)
        if not source.is_local:
            raise DataError(
                f"the number of samples in {source.shown} is unknown: run python -m data.manifest SHARDS --out "
                "manifest.json, with all shards of this kind as configured, and set data.manifest=manifest.json"
            )
        shard = Shard(Path(source.location), samples=self._samples)
        if not len(shard):
            self.empty[number] = shard.emptiness
            return Entry(0)
        self._reserve(number)[0].set_result(shard)
        self._verified.add(number)
        return Entry(len(shard))
