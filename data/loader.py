"""Shards -> batches of pixels and captions, in the order that data.order fixes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data import DataError
from data.keyed import keyed_hash
from data.order import SampleOrder, Visit
from data.samples import BadSample, BadSampleError, decode_pixels, read_captions
from data.shards import Shard, expand_shards

Tokenize = Callable[[list[str]], Tensor]


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    shards: str | tuple[str, ...]  # brace ranges and globs of .tar files
    image_size: int = 64  # pixels a side
    batch_size: int = 64  # of all ranks together
    lanes: int = 1  # shards read side by side: more mix better; a multiple of the ranks, at most the shards
    captions: Literal["best", "any"] = "any"  # of a sample with several: the first, or another at each visit
    prefetch: int = 2  # batches decoded ahead, in threads

    def __post_init__(self) -> None:
        if self.image_size < 1 or self.batch_size < 1 or self.prefetch < 0:
            raise ValueError(
                f"data.image_size ({self.image_size}) and data.batch_size ({self.batch_size}) must be at least 1, "
                f"data.prefetch ({self.prefetch}) at least 0"
            )


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Pictures to measure on: each once, with its best caption, at the size of those trained on."""

    shards: str | tuple[str, ...]
    batch_size: int = 64  # pictures measured at once

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"validation.batch_size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's share of a global batch of B."""

    pixels: Tensor  # B x 3 x S x S in [-1, 1]
    captions: list[str]
    tokens: Tensor | None  # B x L, if a tokenizer was given
    positions: list[int]  # of each sample in the run's global order: the seed of all that is drawn for it
    samples: list[tuple[int, int]]  # (shard, index): which sample it is, wherever it stands in the order


class CaptionedImages:
    """An endless stream of batches with an integer position: the number of the global batch.

    A sample that cannot be used is recorded once in `bad_samples` and reported through `on_bad`; the next good
    sample of its shard stands in for it, so that the order of all others is untouched.

    Raises DataError where a shard as a whole is unusable, ValueError where lanes, batch and ranks do not fit.
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
    ) -> None:
        self.config, self.seed, self.rank, self.ranks = config, seed, rank, ranks
        self.tokenize, self.on_bad = tokenize, on_bad
        self.shards = [Shard(path) for path in expand_shards(config.shards)]
        self.order = SampleOrder(
            [len(shard) for shard in self.shards], batch_size=config.batch_size, lanes=config.lanes, seed=seed
        )
        self.order.batch(0, rank=rank, ranks=ranks)  # ranks that do not fit fail here rather than in a thread
        self.bad_samples: dict[tuple[int, int], BadSample] = {}

    def __len__(self) -> int:
        """Samples in all shards: one epoch."""
        return sum(len(shard) for shard in self.shards)

    def stream(self, position: int = 0) -> Generator[Batch]:
        """Global batches `position`, `position` + 1, ... decoded ahead by `prefetch` threads."""
        if not self.config.prefetch:
            while True:
                yield self.batch(position)
                position += 1
        with ThreadPoolExecutor(self.config.prefetch, thread_name_prefix="decode") as pool:
            ahead: deque[Future[Batch]] = deque()
            while True:
                while len(ahead) <= self.config.prefetch:
                    ahead.append(pool.submit(self.batch, position + len(ahead)))
                yield ahead.popleft().result()
                position += 1

    def batch(self, number: int) -> Batch:
        """This rank's share of global batch `number`: a pure function of the configuration and the shards."""
        return self._assemble(self.order.batch(number, rank=self.rank, ranks=self.ranks))

    def once(self, batch_size: int) -> Iterator[Batch]:
        """Every sample once, in the shards' own order, with its best caption: for measuring. Bad ones are left out.

        Raises DataError if all are bad.
        """
        everything = [(shard, index) for shard, own in enumerate(self.shards) for index in range(len(own))]
        for start in range(0, len(everything), batch_size):
            loaded = [
                (place, sample)
                for place in everything[start : start + batch_size]
                if (sample := self._try_load(*place)) is not None
            ]
            if loaded:
                places = [place for place, _ in loaded]
                yield self._batch([s[0] for _, s in loaded], [s[1][0] for _, s in loaded], [-1] * len(places), places)
        if len(self.bad_samples) == len(everything):
            raise DataError(f"none of the {len(everything)} samples of {self.config.shards} can be used: give others")

    def _assemble(self, visits: list[Visit]) -> Batch:
        pixels, captions, samples = [], [], []
        for visit in visits:
            index, (picture, texts) = self._load_or_next(visit)
            choice = (
                keyed_hash("caption", self.seed, visit.position) % len(texts) if self.config.captions == "any" else 0
            )
            pixels.append(picture)
            captions.append(texts[choice])
            samples.append((visit.shard, index))
        return self._batch(pixels, captions, [visit.position for visit in visits], samples)

    def _batch(
        self, pixels: list[Tensor], captions: list[str], positions: list[int], samples: list[tuple[int, int]]
    ) -> Batch:
        tokens = self.tokenize(captions) if self.tokenize is not None else None
        return Batch(torch.stack(pixels), captions, tokens, positions, samples)

    def _load_or_next(self, visit: Visit) -> tuple[int, tuple[Tensor, list[str]]]:
        size = len(self.shards[visit.shard])
        for step in range(size):
            index = (visit.index + step) % size
            loaded = self._try_load(visit.shard, index)
            if loaded is not None:
                return index, loaded
        raise DataError(f"no sample of shard {self.shards[visit.shard].path} can be used: remove it from data.shards")

    def _try_load(self, shard: int, index: int) -> tuple[Tensor, list[str]] | None:
        if (shard, index) in self.bad_samples:
            return None
        raw = self.shards[shard][index]
        try:
            return decode_pixels(raw, self.config.image_size), read_captions(raw)
        except BadSampleError as error:
            bad = BadSample(raw.shard, raw.key, str(error))
            if self.bad_samples.setdefault((shard, index), bad) is bad:
                self.on_bad(bad)
            return None


def held_out(config: HeldOutConfig, *, image_size: int, tokenize: Tokenize | None = None) -> CaptionedImages:
    """The held-out pictures, for `once(config.batch_size)`. Raises as CaptionedImages does."""
    reading = DataConfig(shards=config.shards, image_size=image_size, batch_size=config.batch_size, captions="best")
    return CaptionedImages(reading, seed=0, tokenize=tokenize)
