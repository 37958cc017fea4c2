"""Readers: what a sample becomes, column by column, in the loader's threads.

To add a column (precomputed latents, a hint, sizes): a reader that returns it. Nothing else in data/ knows of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from data.config import DataConfig
from data.keyed import keyed_hash
from data.samples import decode_pixels, read_captions
from data.shards import RawSample

Tokenize = Callable[[list[str]], Tensor]
Column = Tensor | list[Any]  # B x ..., or B values


class Reader(Protocol):
    """Pure functions, called by several threads at once."""

    def read(self, raw: RawSample) -> Mapping[str, Any]:
        """Decode one sample. Raises BadSampleError if it cannot be used."""
        ...

    def collate(self, samples: Sequence[Mapping[str, Any]], positions: Sequence[int] | None) -> dict[str, Column]:
        """Make a batch's columns of what `read` returned.

        positions: of the samples in the run's global order; None: each sample is measured once, in no run.
        """
        ...


class ImageCaptionReader:
    """Columns pixels, B x 3 x S x S float32 in [-1, 1]; captions, B strings; and tokens, B x L, with a tokenizer."""

    def __init__(self, config: DataConfig, *, seed: int, tokenize: Tokenize | None = None) -> None:
        self.image_size, self.any_caption = config.image_size, config.captions == "any"
        self.seed, self.tokenize = seed, tokenize

    def read(self, raw: RawSample) -> dict[str, Any]:
        return {"pixels": decode_pixels(raw, self.image_size), "captions": read_captions(raw)}

    def collate(self, samples: Sequence[Mapping[str, Any]], positions: Sequence[int] | None) -> dict[str, Column]:
        captions = [self._caption(sample["captions"], row, positions) for row, sample in enumerate(samples)]
        columns: dict[str, Column] = {"pixels": torch.stack([sample["pixels"] for sample in samples])}
        columns["captions"] = captions
        return columns if self.tokenize is None else columns | {"tokens": self.tokenize(captions)}

    def _caption(self, captions: list[str], row: int, positions: Sequence[int] | None) -> str:
        """The best caption, which is the first, or another at each visit."""
        if positions is None or not self.any_caption:
            return captions[0]
        return captions[keyed_hash("caption", self.seed, positions[row]) % len(captions)]
