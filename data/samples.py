"""From the bytes of a sample to pixels and captions, or to the reason why that cannot be."""

from __future__ import annotations

import io
import json
import unicodedata
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from data.quarantine import BadSampleError
from data.shards import IMAGE_EXTENSIONS, RawSample

IMAGE_FORMATS = ("WEBP", "PNG", "JPEG")
MOST_PIXELS = 64_000_000
LONGEST_CAPTION = 64 << 10  # bytes of UTF-8
CONTROLS = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0)), " ")  # Unicode's category Cc


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
            if image.width * image.height > MOST_PIXELS:  # seen from the header, before it takes memory
                raise BadSampleError(f"the image has {image.width} x {image.height} pixels, more than {MOST_PIXELS:,}")
            picture = over_white(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:  # its own words hold an address in memory
        raise BadSampleError(f"the image does not decode (no {', '.join(IMAGE_FORMATS)})") from error
    except BadSampleError:
        raise
    except Exception as error:  # Pillow meets strange bytes with errors of every kind
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise BadSampleError(f"the image does not decode ({first})") from error
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

    In Unicode's composed form (NFC), control characters made spaces. Raises BadSampleError for what is not UTF-8, no
    text, or longer than 64 KiB, and if no caption has text: an empty one would teach that the prompt means nothing.
    """
    found: list[Any] = []
    try:
        if "txt" in raw.members:
            found.append(raw.members["txt"].decode("utf-8-sig"))  # without a byte-order mark
        if "json" in raw.members:
            record = json.loads(raw.members["json"].decode("utf-8-sig"))
            more = record.get("captions") or []
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
        raise BadSampleError(f"a caption holds half of a character ({unpaired!r}), which no tokenizer can read")
    if len(caption.encode()) > LONGEST_CAPTION:
        raise BadSampleError(f"a caption takes {len(caption.encode()):,} bytes, more than {LONGEST_CAPTION:,}")
    return unicodedata.normalize("NFC", caption.translate(CONTROLS)).strip()
