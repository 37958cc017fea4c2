"""From the bytes of a sample to pixels and captions, or to the reason why that cannot be."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass

import torch
from PIL import Image, ImageOps

from data.shards import RawSample

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")
IMAGE_FORMATS = ("WEBP", "PNG", "JPEG")


@dataclass(frozen=True, slots=True)
class BadSample:
    """A sample that cannot be used: what a person needs to find it and mend it."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.key} in {self.shard}: {self.reason}"


class BadSampleError(Exception):
    """Carries the reason; the loader turns it into a BadSample."""


def decode_pixels(raw: RawSample, image_size: int) -> torch.Tensor:
    """Pixels 3 x S x S, float32 in [-1, 1]; transparency becomes white, other shapes are centre-cropped.

    Raises BadSampleError if there is no image or it does not decode.
    """
    data = next((raw.members[extension] for extension in IMAGE_EXTENSIONS if extension in raw.members), None)
    if data is None:
        raise BadSampleError(f"no image among its members {sorted(raw.members)}")
    try:
        # Only these formats: Pillow would hand others, such as EPS, to programs outside.
        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            picture = over_white(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSampleError(f"the image does not decode ({str(error).splitlines()[0]})") from error
    return to_pixels(square(picture, image_size))


def to_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as 3 x H x W, float32 in [-1, 1]."""
    flat = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return flat.view(image.height, image.width, 3).permute(2, 0, 1).float().div_(127.5).sub_(1.0)


def over_white(image: Image.Image) -> Image.Image:
    """RGB; what is transparent shows white."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()
    layer = eight_bits(image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, where Pillow would clip it to 255; any other as it is."""
    return image.point(lambda value: value * (1 / 256)).convert("L") if image.mode == "I;16" else image


def square(image: Image.Image, size: int) -> Image.Image:
    """The centred square of an image, resized to size x size; untouched where it already fits."""
    if image.size == (size, size):
        return image
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def read_captions(raw: RawSample) -> list[str]:
    """All captions, best first: the .txt, then json["caption"] and json["captions"], each once.

    Raises BadSampleError if none has text: an empty caption would teach that the prompt means nothing.
    """
    captions: list[str] = []
    try:
        if "txt" in raw.members:
            captions.append(raw.members["txt"].decode("utf-8-sig"))  # without a byte-order mark
        if "json" in raw.members:
            record = json.loads(raw.members["json"])
            more = record.get("captions") or []
            captions += [record.get("caption") or "", *(more if isinstance(more, list) else [more])]
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise BadSampleError(f"its caption or json does not parse ({error})") from error
    if not all(isinstance(caption, str) for caption in captions):
        raise BadSampleError("a caption is not text")
    for caption in captions:
        if unpaired := next((character for character in caption if "\ud800" <= character <= "\udfff"), None):
            raise BadSampleError(f"a caption holds half of a character ({unpaired!r}), which no tokenizer can read")
    captions = list(dict.fromkeys(caption.strip() for caption in captions if caption.strip()))
    if not captions:
        raise BadSampleError("no caption (neither in .txt nor in .json)")
    return captions
