"""What the tests of batches share."""

from __future__ import annotations

import itertools

import torch

from data.config import DataConfig
from data.loader import Batch, CaptionedImages
from data.readers import ImageCaptionReader, Tokenize

SIZES = [3, 5, 2, 4]
BAD = [(1, 0), (1, 1), (3, 2)]


def images(shards: str, *, tokenize: Tokenize | None = None, **settings: object) -> CaptionedImages:
    """A loader of the tiny shards; DataConfig's settings and the loader's own are told apart by name."""
    own = {
        name: settings.pop(name)
        for name in ("seed", "rank", "ranks", "reader", "on_bad", "quarantine", "remarks")
        if name in settings
    }
    config = DataConfig(**{"shards": (shards,), "image_size": 8, "batch_size": 8, "lanes": 4} | settings)  # pyright: ignore[reportArgumentType]
    if tokenize is not None:
        own["reader"] = ImageCaptionReader(config, seed=7, tokenize=tokenize)
    return CaptionedImages(config, **{"seed": 7} | own)  # pyright: ignore[reportArgumentType]


def first(loader: CaptionedImages, count: int, position: int = 0) -> list[Batch]:
    return list(itertools.islice(loader.stream(position), count))


def same(a: Batch, b: Batch) -> bool:
    plain = (a.captions, a.positions, a.samples) == (b.captions, b.positions, b.samples)
    return plain and torch.equal(a.pixels, b.pixels)
