"""Readers: what a sample becomes, column by column, in the loader's threads: its bytes, pixels and captions.

To add a column (precomputed latents, a hint, sizes): a reader that returns it. Nothing else in data/ knows of columns.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from data.config import DataConfig
from data.order import keyed_hash
from data.pictures import decode_picture, over_white
from data.shards import IMAGE_EXTENSIONS, BadSampleError, RawSample

LONGEST_CAPTION = 64 << 10  # bytes of UTF-8
CONTROLS = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)), " ")  # Unicode's category Cc

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


def decode_pixels(raw: RawSample, image_size: int) -> Tensor:
    """Decode to 3 x S x S, float32 in [-1, 1]; transparency becomes white, other shapes are centre-cropped.

    Raises BadSampleError if there is no image or it does not decode.
    """
    data = next((raw.members[extension] for extension in IMAGE_EXTENSIONS if extension in raw.members), None)
    if data is None:
        raise BadSampleError(f"no image among its members {sorted(raw.members)}")
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


def read_captions(raw: RawSample) -> list[str]:
    """Read all captions, best first: the .txt, then json["caption"] and json["captions"], each once.

    Captions are normalised to NFC, and control characters become spaces. Raises BadSampleError for a caption that is
    not UTF-8, not text or above 64 KiB, or if all are empty: those would teach that the prompt means nothing.
    """
    found: list[Any] = []
    try:
        if "txt" in raw.members:
            found.append(raw.members["txt"].decode("utf-8-sig"))  # without a byte-order mark
        if "json" in raw.members:
            record = json.loads(raw.members["json"].decode("utf-8-sig"))
            more: Any = record.get("captions") or []
            found += [record.get("caption") or "", *(more if isinstance(more, list) else [more])]
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadSampleError(f"its caption or json does not parse ({error})") from error
    captions = list(dict.fromkeys(text for caption in found if (text := _clean(caption))))
    if not captions:
        raise BadSampleError("no caption (neither in .txt nor in .json)")
    return captions


def _clean(caption: Any) -> str:
    if not isinstance(caption, str):
        raise BadSampleError("a caption is not text")
    if caption.isascii() and caption.isprintable() and len(caption) <= LONGEST_CAPTION:  # nearly all: nothing to clean
        return caption.strip()
    if unpaired := next((character for character in caption if "\ud800" <= character <= "\udfff"), None):
        raise BadSampleError(f"a caption contains an unpaired surrogate ({unpaired!r}), which no tokenizer can read")
    if len(caption.encode()) > LONGEST_CAPTION:
        raise BadSampleError(f"a caption has {len(caption.encode()):,} bytes, more than {LONGEST_CAPTION:,}")
    return unicodedata.normalize("NFC", caption.translate(CONTROLS)).strip()
