"""Read image files to start from. Does not import torch."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.files.digest import SHORT, short_hash

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 2**26
FILE_HASH = "foundry_file_hash"  # key of an image's info


def read_picture(path: Path) -> Image.Image:
    """Read a PNG, JPEG or WebP file, rotated by its EXIF orientation; the image's info contains the file's hash.

    Raises ValueError or OSError, naming the file, for any other.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}: give a PNG, JPEG or WebP file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the error for large ones is below
            opened = Image.open(path, formats=["PNG", "JPEG", "WEBP"])
        with opened as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels, expected at most {MAX_PIXELS} in all")
            image.load()
            turned = ImageOps.exif_transpose(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a complete PNG, JPEG or WebP picture ({error}): give another") from error
    turned.info[FILE_HASH] = short_hash([path])
    return turned


def picture_hash(image: Image.Image) -> str:
    """Return the first 10 hex digits of a SHA-256: of the file, if `read_picture` read it, else of the pixels."""
    noted = image.info.get(FILE_HASH)
    if noted is not None:
        return str(noted)
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()[:SHORT]
