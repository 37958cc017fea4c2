"""Shards -> batches of pixels and captions, in the order that data.order fixes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from itertools import chain, islice
from typing import Any

import torch
from PIL import ImageFile
from torch import Tensor

from data.config import DataConfig, HeldOutConfig
from data.keyed import keyed_hash
from data.ledger import FEWEST_BAD, BadShare, Ledger
from data.order import SampleOrder, SetSpan, Visit
from data.quarantine import LONGEST, BadSample, BadSampleError, MissingSampleError, Quarantine
from data.samples import decode_pixels, read_captions
from data.sources import Source, expand
from data.store import ShardStore
from ldm.errors import DataError
from ldm.files.messages import printable

Tokenize = Callable[[list[str]], Tensor]
# Shards of which a sample can stand in for a bad one: its own, and the next two that its lane reads. Were there more, a
# place out of reach would be waited for longer than the other ranks wait for this one.
STAND_INS = 3
TOLD = 100  # bad samples that on_bad is told of; the quarantine lists all


@dataclass(frozen=True, slots=True)
class Sample:
    """One that can be used."""

    place: tuple[int, int]  # shard, index
    key: str
    pixels: Tensor  # 3 x S x S in [-1, 1]
    captions: list[str]  # best first


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of a global batch of B."""

    pixels: Tensor  # B x 3 x S x S in [-1, 1]
    captions: list[str]
    tokens: Tensor | None  # B x L, if a tokenizer was given
    positions: list[int]  # of each sample in the run's global order: the seed of all that is drawn for it
    samples: list[tuple[int, int]]  # (shard, index): which sample it is, wherever it stands in the order
    keys: list[str]  # SHARD'S NAME:KEY of each sample, for people

    def split(self, parts: int) -> list[Batch]:
        """`parts` equal batches that follow one another in this one. Raises ValueError if it cannot be divided so."""
        if parts < 1 or len(self.captions) % parts:
            raise ValueError(f"a batch of {len(self.captions)} cannot be split into {parts} equal parts: use a divisor")
        size = len(self.captions) // parts
        return [self._part(slice(start, start + size)) for start in range(0, len(self.captions), size)]

    def _part(self, own: slice) -> Batch:
        return Batch(
            self.pixels[own],
            self.captions[own],
            None if self.tokens is None else self.tokens[own],
            self.positions[own],
            self.samples[own],
            self.keys[own],
        )


class CaptionedImages:
    """An endless stream of batches with an integer position: the number of the global batch.

    A sample that cannot be used is recorded once in `bad_samples`, reported through `on_bad` and listed in the
    `quarantine`; the next good sample of its shard stands in for it, or, where the shard holds none, one of the next
    shard of its lane: the order of all others is untouched. `ledger` says what became of each visit of the stream.

    Raises DataError where shards cannot be counted, where nothing can stand in, and where the share of bad samples
    among the last 10,000 visits, or of missing ones among all, is above config.max_bad_fraction; ValueError where
    lanes, batch and ranks do not fit, for a pipe that is not allowed and for a package that is missing.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        tokenize: Tokenize | None = None,
        rank: int = 0,
        ranks: int = 1,
        on_bad: Callable[[BadSample], None] = lambda bad: print(f"bad sample: {bad}", flush=True),
        quarantine: Quarantine | None = None,
    ) -> None:
        if ImageFile.LOAD_TRUNCATED_IMAGES:
            raise ValueError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: cut pictures would pass; leave it False")
        self.config, self.seed, self.rank, self.ranks = config, seed, rank, ranks
        self.tokenize, self.on_bad, self.quarantine = tokenize, on_bad, quarantine
        found = [expand(patterns, allow_pipe=config.allow_pipe) for patterns in config.patterns]
        # Two shards a lane and set: the one that is read and the next.
        open_at_once = 2 * config.lanes * len(found)
        self.store = ShardStore(
            [source for own in found for source in own],
            config,
            keep=-(-open_at_once // ranks) + 2,
            keep_copies=open_at_once,
            on_damage=lambda line: print(f"damaged: {line}", flush=True),
        )
        self.order = SampleOrder(
            self.store.sizes, batch_size=config.batch_size, lanes=config.lanes, seed=seed, sets=_spans(config, found)
        )
        self.order.batch(0, rank=rank, ranks=ranks)  # ranks that do not fit fail here rather than in a thread
        self.bad_samples: dict[tuple[int, int], BadSample] = {}
        self._missing: set[tuple[int, int]] = set()  # those of the bad samples that are not there at all
        self.ledger, self._bad_share = Ledger(self.store.sizes), BadShare()

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """What the order of samples depends on beside the configuration: how many there are in each shard, in order.
        And contents: the shards' own digest, if manifests give it."""
        sizes = self.store.sizes
        digest = hashlib.sha256(json.dumps(list(sizes)).encode()).hexdigest()
        return {"shards": len(sizes), "samples": sum(sizes), "sha256": digest, "contents": self.store.contents}

    def __len__(self) -> int:
        """Samples in all shards: one epoch of each set."""
        return sum(self.store.sizes)

    def stream(self, position: int = 0) -> Generator[Batch]:
        """Global batches `position`, `position` + 1, ... decoded ahead by `prefetch` threads."""
        self.ledger, self._bad_share = Ledger(self.store.sizes), BadShare()
        with closing(self._ahead(position)) as assembled:
            for visits, batch in assembled:
                self._account(visits, batch.samples)
                yield batch

    def batch(self, number: int) -> Batch:
        """This rank's share of global batch `number`: a pure function of the configuration and the shards."""
        return self._assemble(number)[1]

    def once(self, batch_size: int) -> Iterator[Batch]:
        """Every sample once, in the shards' own order, with its best caption: for measuring. Bad ones are left out.

        Raises DataError if all are bad.
        """
        everything = [(shard, index) for shard, size in enumerate(self.store.sizes) for index in range(size)]
        for start in range(0, len(everything), batch_size):
            places = everything[start : start + batch_size]
            loaded = [sample for place in places if (sample := self._try_load(*place)) is not None]
            for place in places:
                if place not in self._missing:
                    self._bad_share.record(place, is_bad=place in self.bad_samples)
            self._check_shares()
            if loaded:
                yield self._batch(loaded, [sample.captions[0] for sample in loaded], [-1] * len(loaded))
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
        self.ledger.record(visits, samples)
        for visit, sample in zip(visits, samples, strict=True):
            asked = (visit.shard, visit.index)
            if asked not in self._missing:
                self._bad_share.record(asked, is_bad=sample != asked)
        self._check_shares()

    def _check_shares(self) -> None:
        most, own = self.config.max_bad_fraction, len(self) / self.ranks
        # Missing samples come by the shard, so their share is of all samples, not of those seen of late.
        if (missing := len(self._missing)) >= FEWEST_BAD and missing > most * own:
            raise DataError(f"{missing:,} of {own:,.0f} samples are missing, {self._why(missing=True)}")
        if (found := self._bad_share.above(most)) is not None:
            raise DataError(f"{found[0]:,} of the last {found[1]:,} samples cannot be used, {self._why(missing=False)}")

    def _why(self, *, missing: bool) -> str:
        """What most of those that are missing, or of the other bad ones, suffer from, and what can be done."""
        bad = dict(self.bad_samples)  # threads go on adding to it
        places = [place for place in bad if (place in self._missing) == missing] or bad
        reasons = Counter(bad[place].reason.partition(" (")[0] for place in places)
        listed = "the lines above" if self.quarantine is None else self.quarantine.path
        return (
            f"more than max_bad_fraction ({self.config.max_bad_fraction:g}) allows, most often since: "
            f"{reasons.most_common(1)[0][0]}. {listed} names them: mend or remove them, or allow more"
        )

    def _assemble(self, number: int) -> tuple[list[Visit], Batch]:
        visits = self.order.batch(number, rank=self.rank, ranks=self.ranks)
        streams = [islice(self.order.shards_from(visit), 2) for visit in {one.shard: one for one in visits}.values()]
        for shard in chain.from_iterable(zip(*streams, strict=True)):  # all present, then all next ones
            self.store.make_ready(shard)
        samples = [self._load_or_next(visit) for visit in visits]
        captions = [self._caption(sample, visit) for sample, visit in zip(samples, visits, strict=True)]
        return visits, self._batch(samples, captions, [visit.position for visit in visits])

    def _caption(self, sample: Sample, visit: Visit) -> str:
        if self.config.captions == "best":
            return sample.captions[0]
        return sample.captions[keyed_hash("caption", self.seed, visit.position) % len(sample.captions)]

    def _batch(self, samples: list[Sample], captions: list[str], positions: list[int]) -> Batch:
        return Batch(
            torch.stack([sample.pixels for sample in samples]),
            captions,
            self.tokenize(captions) if self.tokenize is not None else None,
            positions,
            [sample.place for sample in samples],
            [printable(f"{self.store.sources[sample.place[0]].name}:{sample.key}", LONGEST) for sample in samples],
        )

    def _load_or_next(self, visit: Visit) -> Sample:
        """The visited sample, or what stands in for it."""
        sample = self._try_load(visit.shard, visit.index)
        if sample is not None:
            return sample
        # Where shards are few, a lane may read one epoch after epoch before it gets another.
        near = dict.fromkeys(islice(self.order.shards_from(visit), 20 * STAND_INS))
        for shard in islice(near, STAND_INS):
            # Counted from the visited one's number: so of many that are missing each has a stand-in of its own.
            present = self.store.present(shard)
            indices = ((visit.index + step) % present for step in range(present))
            for index in indices:
                if (sample := self._try_load(shard, index)) is not None:
                    return sample
        raise DataError(
            f"no sample of shard {self.store.sources[visit.shard].shown} can be used, nor any of the next of its "
            f"lane ({self.bad_samples[visit.shard, visit.index].reason}): mend it, or remove it from data.shards"
        )

    def _try_load(self, shard: int, index: int) -> Sample | None:
        if (shard, index) in self.bad_samples:
            return None
        try:
            raw = self.store.read(shard, index)
            return Sample((shard, index), raw.key, decode_pixels(raw, self.config.image_size), read_captions(raw))
        except (BadSampleError, DataError) as error:
            bad = BadSample(self.store.sources[shard].shown, self.store.key(shard, index), str(error))
            self._report((shard, index), bad)
            if isinstance(error, (MissingSampleError, DataError)):
                self._missing.add((shard, index))
            return None

    def _report(self, place: tuple[int, int], bad: BadSample) -> None:
        if self.bad_samples.setdefault(place, bad) is bad:  # two threads may have met it at once
            if self.quarantine is not None:
                self.quarantine.add(bad)
            if len(self.bad_samples) <= TOLD:
                self.on_bad(bad)


def held_out(config: HeldOutConfig, *, image_size: int, tokenize: Tokenize | None = None) -> CaptionedImages:
    """The held-out pictures, for `once(config.batch_size)`. Raises as CaptionedImages does."""
    reading = {entry.name: getattr(config, entry.name) for entry in fields(HeldOutConfig)}
    return CaptionedImages(DataConfig(**reading, image_size=image_size, captions="best"), seed=0, tokenize=tokenize)


def _spans(config: DataConfig, found: list[list[Source]]) -> list[SetSpan]:
    """The sets as the order sees them. Weights as they are written: 0.1 is a tenth."""
    return [
        SetSpan(one.name, Fraction(str(one.weight)), len(own)) for one, own in zip(config.sets, found, strict=False)
    ]
