"""Picture files -> upright images of 8 bits in sRGB: the one decoder of training, drawing, masks and Python.

Whatever its file says of its pixels is followed here: orientation, ICC profile, transparency, palette, depth. Does not
import torch.
"""

from __future__ import annotations

import io
from contextlib import suppress
from functools import cache
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from data.bare import bare
from data.colour import UnknownWhiteError, srgb
from data.orientation import turned

# Only these: Pillow would pass others, such as EPS, to external programs. TGA has no mark to know it by: it is last.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")
READ = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PPM or TGA"  # for messages
# Of a sample's files: the first of these is its picture.
EXTENSIONS = (
    "webp", "png", "jpg", "jpeg", "gif", "bmp", "tif", "tiff", "avif", "tga", "ppm", "pgm", "pbm", "pnm", "pfm",
    "jp2", "j2k", "jpx", "jpf", "jfif", "jpe", "apng", "dib", "heic", "heif",
)  # fmt: skip
MOST_PIXELS = 64_000_000
HEAD = 512  # bytes that tell what a file is
HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # brands
AVIF = (b"avif", b"avis")
TO_PNG = "convert it to PNG"
# First bytes -> what is not read, and what to do.
OTHERS = {
    b"%!PS": f"EPS or PostScript, which only a program can draw: {TO_PNG}",
    b"\xc5\xd0\xd3\xc6": f"EPS, which only a program can draw: {TO_PNG}",
    b"%PDF": f"PDF, which only a program can draw: {TO_PNG}",
    b"<svg": f"SVG, which only a program can draw: {TO_PNG}",
    b"\xd7\xcd\xc6\x9a": f"WMF, which only a program can draw: {TO_PNG}",
    b"8BPS": f"Photoshop's PSD: {TO_PNG}",
    b"gimp xcf": f"GIMP's XCF: {TO_PNG}",
    b"\xff\x0a": f"JPEG XL: {TO_PNG}",
    b"\0\0\0\x0cJXL ": f"JPEG XL: {TO_PNG}",
    b"\0\0\1\0": f"an icon (ICO): {TO_PNG}",
    b"v/1\1": f"OpenEXR: {TO_PNG}",
    b"#?RADIANCE": f"Radiance HDR: {TO_PNG}",
    b"<!doctype html": "a web page: download the picture itself",
    b"<html": "a web page: download the picture itself",
    b"PK\3\4": "a zip archive: unpack it",
}


class TooLargeError(ValueError):
    """A picture of more pixels than are decoded."""


def decode_picture(file: BinaryIO | bytes) -> Image.Image:
    """Decode a picture to RGB, or to RGBA if parts are transparent; of an animation, or of several pages, the first.

    It is upright, in sRGB and has 8 bits. Raises ValueError, saying what is wrong, for whatever cannot be decoded
    completely or has more than 64 million pixels, which its header tells before any memory is used. Metadata that
    cannot be read is no reason.
    """
    file = io.BytesIO(file) if isinstance(file, bytes) else file
    head = file.read(HEAD)
    file.seek(0)
    try:
        with Image.open(file, formats=_formats(head)) as image:
            return _decoded(image)
    except (TooLargeError, UnknownWhiteError):
        raise
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"it has more than {MOST_PIXELS:,} pixels: make it smaller") from error
    except Exception as error:  # Pillow raises many kinds of errors for malformed data
        file.seek(0)
        for alone in bare(file.read()):
            with suppress(Exception), Image.open(io.BytesIO(alone), formats=_installed()) as image:
                return _decoded(image)
        if isinstance(error, UnidentifiedImageError):  # its own message contains a memory address
            raise ValueError(_unread(head)) from error
        raise _damage(error) from error


def normalized(image: Image.Image) -> Image.Image:
    """Convert an image as `decode_picture` does; one that is nothing but RGB is returned as it is.

    Raises ValueError, saying what is wrong, if it cannot be decoded completely.
    """
    try:
        return _decoded(image)
    except (TooLargeError, UnknownWhiteError):
        raise
    except Exception as error:
        raise _damage(error) from error


def _decoded(image: Image.Image) -> Image.Image:
    if image.width * image.height > MOST_PIXELS:
        has = f"it has {image.width} x {image.height} pixels"
        raise TooLargeError(f"{has}, expected at most {MOST_PIXELS:,}: make it smaller")
    return turned(srgb(image), image)


def _damage(error: Exception) -> ValueError:
    """Return the error for a file that breaks off or is damaged, with the first line of Pillow's words."""
    return ValueError(f"it is damaged ({(str(error) or type(error).__name__).splitlines()[0]}): use an intact copy")


def over_white(picture: Image.Image) -> Image.Image:
    """Composite an RGB or RGBA image over white, as RGB."""
    if picture.mode == "RGB":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _formats(head: bytes) -> list[str]:
    """List the formats to try; HEIC is read if the package pillow-heif is installed."""
    if _brand(head) in HEIC:
        try:
            import pillow_heif  # pyright: ignore[reportMissingImports]

            pillow_heif.register_heif_opener()  # pyright: ignore[reportUnknownMemberType]
            return ["HEIF"]
        except ImportError:
            pass
    return _installed()


@cache
def _installed() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _brand(head: bytes) -> bytes:
    """Return the brand of a file in MPEG 4's container, as HEIC and AVIF are; AVIF's if it is one of several."""
    if head[4:8] != b"ftyp":
        return b""
    length = int.from_bytes(head[:4], "big")
    brands = [head[8:12], *(head[start : start + 4] for start in range(16, min(length, len(head)), 4))]
    return next((brand for brand in brands if brand in AVIF), brands[0])


def _unread(head: bytes) -> str:
    """Say what a file is that none of the formats fits."""
    brand, text = _brand(head), head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        return "it is empty"
    if brand in HEIC:
        return "it is HEIC, which Pillow reads with another package: pip install pillow-heif"
    if brand in AVIF and "AVIF" not in _installed():
        return "it is AVIF, which this Pillow does not read: pip install --upgrade pillow"
    if b"<svg" in head:
        return f"it is {OTHERS[b'<svg']}"
    for mark, words in OTHERS.items():
        if head.startswith(mark) or text[: len(mark)].lower() == mark:
            return f"it is {words}"
    return f"it is no {READ}, or is damaged where it begins: {TO_PNG}"
