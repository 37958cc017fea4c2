"""Picture files: read those to start from, and write new ones that never replace others. Does not import torch."""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.files.atomic import write_new
from ldm.files.digest import SHORT, short_hash

if TYPE_CHECKING:
    from PIL import Image

FILE_HASH = "foundry_file_hash"  # key of an image's info
TRANSPARENCY = "transparency"  # in the place of a hash: a mask that was made from the picture's own


def read_picture(path: Path) -> Image.Image:
    """Read a picture file as training does: see `decode_picture`. The image's info contains the file's hash.

    Raises ValueError or OSError, naming the file, if that is not possible.
    """
    from data.pictures import READ, decode_picture

    if not path.is_file():
        raise FileNotFoundError(f"there is no picture {path}: give a file, {READ}")
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of odd metadata and of sizes that are an error here
            picture = decode_picture(file)
    except ValueError as error:
        raise ValueError(f"{path} cannot be used as a picture: {error}") from error
    picture.info[FILE_HASH] = short_hash([path])
    return picture


def as_read(image: Image.Image) -> Image.Image:
    """Convert an image as `read_picture` does, if it is not RGB or RGBA already; its info contains the hash of what it
    was. Raises ValueError if it cannot be decoded."""
    from data.pictures import normalized

    picture = normalized(image)
    if picture is not image:
        picture.info[FILE_HASH] = picture_hash(image)
    return picture


def mask_of_transparency(picture: Image.Image) -> Image.Image | None:
    """Return a mask that is white where an image that was read is transparent; None if it is opaque."""
    if picture.mode != "RGBA":
        return None
    mask = picture.getchannel("A").point(lambda alpha: 255 - alpha)
    mask.info[FILE_HASH] = TRANSPARENCY
    return mask


def picture_hash(image: Image.Image) -> str:
    """Return the first 10 hex digits of a SHA-256: of the file, if `read_picture` read it, else of the pixels."""
    noted = image.info.get(FILE_HASH)
    if noted is not None:
        return str(noted)
    return hashlib.sha256(f"{image.mode} {image.size} ".encode() + image.tobytes()).hexdigest()[:SHORT]


class NumberedFiles:
    """New PNG files in a folder, numbered from the highest existing one: 00000.png, grid-0000.png."""

    def __init__(self, folder: Path, *, prefix: str = "", digits: int) -> None:
        self.folder, self.prefix, self.digits = folder, prefix, digits
        name = re.compile(re.escape(prefix) + r"(\d+)\.png")
        entries = folder.iterdir() if folder.is_dir() else ()
        taken = [int(match[1]) for entry in entries if (match := name.fullmatch(entry.name))]
        self.next = max(taken, default=-1) + 1

    def write(self, content: bytes) -> Path:
        """Write a complete file under the next free name; never replace one, whoever wrote it.

        The folder is created with the first file, so that a drawing that fails leaves none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            path = self.folder / f"{self.prefix}{self.next:0{self.digits}d}.png"
            self.next += 1
            try:
                write_new(path, content)
                return path
            except FileExistsError:  # another process took this name
                continue


def check_folder(folder: Path) -> None:
    """Raise OSError or ValueError if the folder cannot be created or written to; does not create it."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise ValueError(f"pictures cannot be written to {folder}: {nearest} is not a folder; choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"pictures cannot be written to {folder}: no permission to write to {nearest}; choose another"
        )
