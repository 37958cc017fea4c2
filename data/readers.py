"""Readers: what a sample becomes, column by column, in the loader's threads: its bytes, pixels and captions.

To add a column (precomputed latents, a hint, sizes): a reader that returns it. Nothing else in data/ knows of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from data.captions import find_captions
from data.config import DataConfig
from data.order import keyed_hash
from data.pictures import decode_picture, over_white
from data.shards import BadSampleError, RawSample

UNUSED, NAMES = "unused", "names"

Tokenize = Callable[[list[str]], Tensor]
Column = Tensor | list[Any]  # B x ..., or B values


class Reader(Protocol):
    """Pure functions, called by several threads at once."""

    def read(self, raw: RawSample) -> Mapping[str, Any]:
        """Decode one sample. Raises BadSampleError if it cannot be used.

        Under UNUSED, it may list what of a usable sample cannot be used, and under NAMES those of config.image_keys and
        config.caption_keys that the sample has; the loader reports the one, and names that no sample has.
        """
        ...

    def collate(self, samples: Sequence[Mapping[str, Any]], positions: Sequence[int] | None) -> dict[str, Column]:
        """Make a batch's columns of what `read` returned.

        positions: of the samples in the run's global order; None: each sample is measured once, in no run.
        """
        ...


class ImageCaptionReader:
    """Columns pixels, B x 3 x S x S float32 in [-1, 1]; captions, B strings; and tokens, B x L, with a tokenizer."""

    def __init__(self, config: DataConfig, *, seed: int, tokenize: Tokenize | None = None) -> None:
        self.config, self.image_size, self.any_caption = config, config.image_size, config.captions == "any"
        self.seed, self.tokenize = seed, tokenize

    def read(self, raw: RawSample) -> dict[str, Any]:
        texts, unused, names = find_captions(raw, self.config)
        names |= {key for key in self.config.image_keys if key.strip(".").lower() in raw.endings}
        return {"pixels": decode_pixels(raw, self.image_size), "captions": texts, UNUSED: unused, NAMES: names}

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


def decode_pixels(raw: RawSample, image_size: int) -> Tensor:
    """Decode to 3 x S x S, float32 in [-1, 1]; transparency becomes white, other shapes are centre-cropped.

    Raises BadSampleError if there is no image or it does not decode.
    """
    data = raw.picture
    try:
        picture = over_white(decode_picture(data))
    except ValueError as error:
        raise BadSampleError(f"the image does not decode ({error})") from error
    return to_pixels(square(picture, image_size))


def to_pixels(image: Image.Image) -> Tensor:
    """Convert an RGB image to 3 x H x W, float32 in [-1, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def square(image: Image.Image, size: int) -> Image.Image:
    """Crop the centred square and resize it to size x size; an image of that size is returned unchanged."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)
