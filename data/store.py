"""Shards by number: opened where they are reached, the last used kept open, the next made ready in the background."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from data.config import ReadingConfig
from data.fetch import PATIENCE, Absent, Cache, Patience
from data.manifest import Entry, entries_for, mismatch
from data.shards import RawSample, Shard
from data.sources import Source, short
from ldm.errors import DataError

AHEAD = 2  # shards made ready at once in the background


class ShardStore:
    """The shards of some sources. Those that a manifest or sizes.json counts are opened when first asked for.

    Others are opened at once to be counted, if they are on this machine. What can be read of a damaged shard is read;
    a shard that cannot be read at all raises DataError wherever it is asked for, until `keep` others have been opened.

    keep: how many are held open; keep_copies: how many copies of remote ones stay at least. on_damage(line): short once
    of each shard that is not what its manifest says.
    Raises DataError for a shard that is nowhere counted and not on this machine, and where counting fails.
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
    ) -> None:
        self.sources, self.keep, self.on_damage = list(sources), keep, on_damage
        self._open: OrderedDict[int, Future[Shard]] = OrderedDict()  # the last used at the end
        self._begun: set[int] = set()  # made ready, or to be: until dropped
        self._verified: set[int] = set()
        self._lock = threading.Lock()
        self._making_ready = threading.BoundedSemaphore(AHEAD)
        self._cache: Cache | None = None
        self._tries = patience.tries
        entries = entries_for(self.sources, manifest=config.manifest, patience=patience)
        if not all(source.is_local for source in self.sources):
            folder = Path(config.cache) if config.cache is not None else None
            self._cache = Cache(folder, most=int(config.cache_gb * 1e9), keep=keep_copies, patience=patience)
        self._entries = [entry or self._counted(number) for number, entry in enumerate(entries)]
        self.sizes = [entry.count for entry in self._entries]

    @property
    def contents(self) -> str | None:
        """One sha256 of those that manifests give of all shards; None if there is a shard that they give none of."""
        digests = [entry.sha256 for entry in self._entries]
        return None if None in digests else hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def __getitem__(self, number: int) -> Shard:
        """Waits until it is open. Raises DataError if nothing of it can be read."""
        future, mine = self._reserve(number)
        if mine:
            self._fulfil(number, future)
        return future.result()

    def read(self, number: int, index: int) -> RawSample:
        """Raises DataError if the shard cannot be read, BadSampleError if that sample cannot."""
        shard = self[number]
        try:
            return shard[index]
        except DataError:
            self.forget(number)  # its file may have been removed from the cache, and can be copied again
            return self[number][index]

    def key(self, number: int, index: int) -> str:
        """The sample's key, or #NUMBER where it is lost."""
        try:
            return self[number].key(index)
        except DataError:
            return f"#{index}"

    def present(self, number: int) -> int:
        """How many of its samples are there."""
        try:
            return self.sizes[number] - self[number].missing
        except DataError:
            return 0

    def make_ready(self, number: int) -> None:
        """Begin to open it in the background, unless that has begun; a failure is not kept: it is tried anew."""
        with self._lock:
            if number in self._open or number in self._begun:
                return
            self._begun.add(number)
        threading.Thread(target=self._make_ready, args=(number,), daemon=True, name="make-ready").start()

    def forget(self, number: int) -> None:
        """Open it anew when it is asked for again."""
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
                        self._open.pop(number, None)  # but it stays begun: the next to try it is who needs it

    def _reserve(self, number: int) -> tuple[Future[Shard], bool]:
        """The shard's future, and whether the caller is the one to fulfil it."""
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
        shard = Shard(path, expected=entry.count, name=source.shown)
        # Once a process, even if the shard is opened again.
        if (problem or shard.damage) and number not in self._verified:
            self.on_damage(f"shard {shard.name}: {'; '.join(filter(None, (problem, shard.damage)))}")
        self._verified.add(number)
        return shard

    def _verified_path(self, source: Source, number: int, entry: Entry) -> tuple[Path, str]:
        """Where the shard's file is, and what shows that it is not what the manifest says, after all tries."""
        path, problem = Path(source.location), ""
        for _ in range(1 if self._cache is None or source.is_local else self._tries):
            if self._cache is not None and not source.is_local:
                if problem:
                    self._cache.drop(source)  # it may have been altered on its way
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
        if not source.is_local:
            raise DataError(
                f"nothing says how many samples {source.shown} holds: write it with python -m data.manifest "
                f"'{source.shown}' --out manifest.json, for all of its kind, and give data.manifest=manifest.json"
            )
        shard = Shard(Path(source.location))
        future: Future[Shard] = Future()
        future.set_result(shard)
        self._open[number] = future
        self._verified.add(number)
        while len(self._open) > self.keep:
            self._open.popitem(last=False)
        return Entry(len(shard))
