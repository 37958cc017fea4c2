"""Load batches of pixels and captions from shards, in the order defined by data.order."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from itertools import chain, islice
from typing import Any

from PIL import ImageFile
from torch import Tensor

from data.bad_samples import FEWEST_BAD, LONGEST, BadSample, BadShare, Quarantine
from data.config import DataConfig, HeldOutConfig, SampleConfig
from data.lost_shards import find_shards, lost_shards
from data.order import SampleOrder, SetSpan, Visit, default_lanes
from data.readers import NAMES, UNUSED, Column, ImageCaptionReader, Reader
from data.remarks import CutCaptions, Remarks
from data.shards import USUAL, BadSampleError, MissingSampleError
from data.store import ShardStore
from ldm.errors import DataError
from ldm.files.messages import printable

# Shards that can provide a substitute for a bad sample: its own, and the next two of its lane. With more, this rank
# could wait for an unreachable location longer than the other ranks wait for it.
SUBSTITUTE_SHARDS = 3
MOST_REPORTED = 100  # bad samples reported through on_bad; the quarantine lists all


@dataclass(frozen=True, slots=True)
class Sample:
    """A usable sample."""

    place: tuple[int, int]  # shard, index
    key: str
    columns: Mapping[str, Any]  # what the reader made of it


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of a global batch, B samples: named columns, and which samples they are."""

    columns: Mapping[str, Column]  # B rows each: see data.readers
    positions: list[int]  # of each sample in the run's global order: it seeds all random draws for the sample
    samples: list[tuple[int, int]]  # (shard, index): identifies a sample, independently of the order
    keys: list[str]  # SHARD_NAME:KEY of each sample, for log lines

    def __len__(self) -> int:
        return len(self.positions)

    def tensor(self, name: str) -> Tensor:
        """The column of this name, B x .... Raises KeyError if the reader makes none."""
        column = self.columns[name]
        assert isinstance(column, Tensor), f"column {name} is not a tensor"
        return column

    @property
    def pixels(self) -> Tensor:
        """B x 3 x S x S in [-1, 1]."""
        return self.tensor("pixels")

    @property
    def captions(self) -> list[str]:
        column = self.columns["captions"]
        assert isinstance(column, list)
        return column

    def split(self, parts: int) -> list[Batch]:
        """Split into `parts` equal, consecutive batches. Raises ValueError if the size is not divisible by it."""
        if parts < 1 or len(self) % parts:
            raise ValueError(f"a batch of {len(self)} cannot be split into {parts} equal parts: use a divisor")
        size = len(self) // parts
        return [self._part(slice(start, start + size)) for start in range(0, len(self), size)]

    def _part(self, own: slice) -> Batch:
        columns = {name: column[own] for name, column in self.columns.items()}
        return Batch(columns, self.positions[own], self.samples[own], self.keys[own])


class CaptionedImages:
    """An endless stream of batches, whose position is one integer: the number of the global batch.

    A sample that cannot be used is recorded once in `bad_samples`, reported through `on_bad` and listed in the
    `quarantine`; what of a usable one cannot be used, in `remarks`. The next good sample of its shard replaces it or,
    if the shard has none, one of the next shards of its lane; the order of all other samples is unchanged.

    Raises DataError if shards cannot be counted, if no substitute is found, or if the fraction of bad samples among
    the last 10,000 visits, or of missing ones among all, exceeds config.max_bad_fraction; and if more shards are absent
    at the start than config.max_missing_shards allows, whose samples then do not count. Raises ValueError if lanes,
    batch size and ranks do not divide, if a pipe is not allowed, or if a package is missing.

    main: whether this process reports the shards that are left out.
    """

    cut_captions: CutCaptions | None = None

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        reader: Reader | None = None,
        rank: int = 0,
        ranks: int = 1,
        on_bad: Callable[[BadSample], None] = lambda bad: print(f"bad sample: {bad}", flush=True),
        quarantine: Quarantine | None = None,
        remarks: Quarantine | None = None,
        section: str = "data",
        main: bool = True,
    ) -> None:
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ValueError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: truncated images would pass; leave it False")
        self.config, self.seed, self.rank, self.ranks = config, seed, rank, ranks
        self.reader = reader if reader is not None else ImageCaptionReader(config, seed=seed)
        self.on_bad, self.quarantine = on_bad, quarantine
        found = find_shards(config)
        self._spans = [  # with the weights as written: 0.1 is exactly a tenth
            SetSpan(one.name, Fraction(str(one.weight)), len(own)) for one, own in zip(config.sets, found, strict=False)
        ]
        lanes = config.lanes if config.lanes is not None else default_lanes(config.batch_size, min(map(len, found)))
        # Two shards per lane and set: the current one and the next.
        open_at_once = 2 * lanes * len(found)
        self.store = ShardStore(
            [source for own in found for source in own],
            config,
            keep=-(-open_at_once // ranks) + 2 * len(found),
            keep_copies=open_at_once,
            on_damage=lambda line: print(f"damaged: {line}", flush=True),
            samples=config,
        )
        self._lost = lost_shards(self.store, config, section=section, say=main)
        self.deal(config.lanes if config.lanes is not None else self._default_lanes())
        self.bad_samples: dict[tuple[int, int], BadSample] = {}
        self._missing: set[tuple[int, int]] = set()  # the bad samples that are absent from their shards
        self._bad_fraction = BadShare()
        self.remarks = Remarks(remarks, lambda line: print(f"remark: {line}", flush=True), config, samples=len(self))

    def count_cut(self, cut_off: Callable[[str], str], *, tokens: int) -> None:
        """Count from now on, in `cut_captions`, those that are longer than a text encoder reads: see CutCaptions."""
        self.cut_captions = CutCaptions(cut_off, tokens=tokens, most=max(len(self) // self.ranks, 1))

    def _default_lanes(self) -> int:
        """Return the number of lanes that the smallest set can serve, by shards that hold samples."""
        spans, sizes = [span.shards for span in self._spans] or [len(self.store.sizes)], iter(self.store.sizes)
        return default_lanes(self.config.batch_size, min(sum(map(bool, islice(sizes, span))) for span in spans))

    def deal(self, lanes: int) -> None:
        """Deal the shards to this number of lanes, before the first batch: a resumed run keeps its number."""
        self.order = SampleOrder(
            self.store.sizes, batch_size=self.config.batch_size, lanes=lanes, seed=self.seed, sets=self._spans
        )
        # Fail here, not in a thread, if the ranks do not divide the batch.
        self.order.batch(0, rank=self.rank, ranks=self.ranks)

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """Identify the data: the digest of the shard sizes, on which the order of samples depends in addition to the
        configuration, and `contents`, the digest of the shards themselves if manifests give it."""
        sizes = [size for size in self.store.sizes if size]
        digest = hashlib.sha256(json.dumps(list(sizes)).encode()).hexdigest()
        return {"shards": len(sizes), "samples": sum(sizes), "sha256": digest, "contents": self.store.contents}

    def __len__(self) -> int:
        """The number of samples in all shards: one epoch of each set."""
        return sum(self.store.sizes)

    @property
    def available(self) -> int:
        """The number of samples in the shards that were there at the start."""
        return len(self) - sum(self.store.sizes[number] for number in self.store.absent)

    def stream(self, position: int = 0) -> Generator[Batch]:
        """Yield global batches `position`, `position` + 1, ..., decoded ahead by `prefetch` threads."""
        self._bad_fraction = BadShare()
        self._list_lost()
        with closing(self._ahead(position)) as assembled:
            for visits, batch in assembled:
                self._account(visits, batch.samples)
                yield batch

    def batch(self, number: int) -> Batch:
        """Load this rank's part of global batch `number`: a pure function of the configuration and the shards."""
        return self._assemble(number)[1]

    def once(self, batch_size: int, *, part: int = 0, parts: int = 1) -> Iterator[Batch]:
        """Yield every sample once, in shard order, with its best caption, for evaluation. Skip bad ones.

        Batch.positions number the samples in that order. part: of `parts`, each of which yields every parts-th batch.
        Raises DataError if all samples are bad.
        """
        self._list_lost()
        everything = [(shard, index) for shard, size in enumerate(self.store.sizes) for index in range(size)]
        for start in range(part * batch_size, len(everything), parts * batch_size):
            places = everything[start : start + batch_size]
            loaded = {start + row: sample for row, place in enumerate(places) if (sample := self._try_load(*place))}
            for place in places:
                if self._counts(place):
                    self._bad_fraction.record(place, is_bad=place in self.bad_samples)
            self._check_fractions()
            if loaded:
                yield self._batch(list(loaded.values()), list(loaded), in_a_run=False)
        if len(self.bad_samples) == len(everything):
            raise DataError(f"none of the {len(everything)} samples of {self.config.patterns} can be used: give others")

    def _ahead(self, position: int) -> Generator[tuple[list[Visit], Batch]]:
        if not self.config.prefetch:
            while True:
                yield self._assemble(position)
                position += 1
        pool = ThreadPoolExecutor(self.config.prefetch, thread_name_prefix="decode")
        ahead: deque[Future[tuple[list[Visit], Batch]]] = deque()
        try:
            while True:
                while len(ahead) <= self.config.prefetch:
                    ahead.append(pool.submit(self._assemble, position + len(ahead)))
                yield ahead.popleft().result()
                position += 1
        finally:
            pool.shutdown(cancel_futures=True)

    def _account(self, visits: Sequence[Visit], samples: Sequence[tuple[int, int]]) -> None:
        for visit, sample in zip(visits, samples, strict=True):
            asked = (visit.shard, visit.index)
            if self._counts(asked):
                self._bad_fraction.record(asked, is_bad=sample != asked)
        self._check_fractions()

    def _counts(self, place: tuple[int, int]) -> bool:
        """Whether a sample counts among the recent ones: missing ones are compared with all."""
        return place[0] not in self.store.absent and place not in self._missing

    def _list_lost(self) -> None:
        """List the shards that are left out, once the run's folder exists."""
        if self.quarantine is not None and self.rank == 0:
            for lost in self._lost:
                self.quarantine.add(lost)

    def _check_fractions(self) -> None:
        most, own = self.config.max_bad_fraction, len(self) / self.ranks
        # A damaged shard loses many at once: compare missing samples with all samples, not with recent ones.
        if (missing := len(self._missing)) >= FEWEST_BAD and missing > most * own:
            raise DataError(f"{missing:,} of {own:,.0f} samples are missing, {self._why(missing=True)}")
        if (found := self._bad_fraction.above(most)) is not None:
            raise DataError(f"{found[0]:,} of the last {found[1]:,} samples cannot be used, {self._why(missing=False)}")

    def _why(self, *, missing: bool) -> str:
        """Explain the most frequent reason among the missing, or the other bad, samples, and what to do."""
        bad = dict(self.bad_samples)  # a copy: threads keep adding to it
        places = [place for place in bad if (place in self._missing) == missing] or bad
        reasons = Counter(bad[place].reason.partition(" (")[0] for place in places)
        listed = "the lines above" if self.quarantine is None else self.quarantine.path
        return (
            f"more than max_bad_fraction ({self.config.max_bad_fraction:g}) allows; most frequent reason: "
            f"{reasons.most_common(1)[0][0]}. See {listed}: repair or remove them, or allow more"
        )

    def _assemble(self, number: int) -> tuple[list[Visit], Batch]:
        visits = self.order.batch(number, rank=self.rank, ranks=self.ranks)
        streams = [islice(self.order.shards_from(visit), 2) for visit in {one.shard: one for one in visits}.values()]
        for shard in chain.from_iterable(zip(*streams, strict=True)):  # all current ones, then all next ones
            self.store.make_ready(shard)
        samples = [self._load_or_substitute(visit) for visit in visits]
        return visits, self._batch(samples, [visit.position for visit in visits], in_a_run=True)

    def _batch(self, samples: list[Sample], positions: list[int], *, in_a_run: bool) -> Batch:
        columns = self.reader.collate([sample.columns for sample in samples], positions if in_a_run else None)
        if in_a_run and self.cut_captions is not None:
            self.cut_captions.measure([str(caption) for caption in columns["captions"]])
        return Batch(
            columns,
            positions,
            [sample.place for sample in samples],
            [printable(f"{self.store.sources[sample.place[0]].name}:{sample.key}", LONGEST) for sample in samples],
        )

    def _load_or_substitute(self, visit: Visit) -> Sample:
        """Load the visited sample or, if it is bad, a substitute."""
        sample = self._try_load(visit.shard, visit.index)
        if sample is not None:
            return sample
        # If there are few shards, a lane may read the same one for several epochs before another.
        near = dict.fromkeys(islice(self.order.shards_from(visit), 20 * SUBSTITUTE_SHARDS))
        for shard in islice(near, SUBSTITUTE_SHARDS):
            # Starting at the visited index, so that many missing samples get different substitutes.
            present = self.store.present(shard)
            indices = ((visit.index + step) % present for step in range(present))
            for index in indices:
                if (sample := self._try_load(shard, index)) is not None:
                    return sample
        raise DataError(
            f"no sample of shard {self.store.sources[visit.shard].shown} can be used, nor any of its lane's next "
            f"shards ({self.bad_samples[visit.shard, visit.index].reason}): repair it, or remove it from data.shards"
        )

    def _try_load(self, shard: int, index: int) -> Sample | None:
        if (shard, index) in self.bad_samples:
            return None
        try:
            raw = self.store.read(shard, index)
            sample = Sample((shard, index), raw.key, self.reader.read(raw))
            for reason in sample.columns.get(UNUSED, ()):
                self.remarks.add(BadSample(self.store.sources[shard].shown, raw.key, reason))
            self.remarks.find(sample.columns.get(NAMES, ()))
            return sample
        except (BadSampleError, DataError) as error:
            bad = BadSample(self.store.sources[shard].shown, self.store.key(shard, index), str(error))
            if shard in self.store.absent:
                self.bad_samples[shard, index] = bad  # reported as a shard, and allowed
                return None
            self._report((shard, index), bad)
            if isinstance(error, (MissingSampleError, DataError)):
                self._missing.add((shard, index))
            return None

    def _report(self, place: tuple[int, int], bad: BadSample) -> None:
        if self.bad_samples.setdefault(place, bad) is bad:  # two threads may find it at once
            if self.quarantine is not None:
                self.quarantine.add(bad)
            if len(self.bad_samples) <= MOST_REPORTED:
                self.on_bad(bad)


def held_out(
    config: HeldOutConfig,
    *,
    image_size: int,
    reader: Reader | None = None,
    samples: SampleConfig = USUAL,
    main: bool = True,
) -> CaptionedImages:
    """Open the held-out images, for `once(config.batch_size)`. Raises the same errors as CaptionedImages.

    samples: which members make a sample, as in training. main: whether this process reports shards that are left out.
    """
    reading = {entry.name: getattr(config, entry.name) for entry in fields(HeldOutConfig)}
    kinds = {entry.name: getattr(samples, entry.name) for entry in fields(SampleConfig)}
    in_order = DataConfig(**reading, **kinds, image_size=image_size, lanes=1, captions="best")
    return CaptionedImages(in_order, seed=0, reader=reader, section="validation", main=main)
