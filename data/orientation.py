"""Which way up a picture is: the orientation in its EXIF or XMP, and nothing else of these.

Cameras and editors write EXIF with tags of wrong types, lengths and places. Only the one entry that is needed is read,
so that the others do no harm; what cannot be understood means upright.
"""

from __future__ import annotations

import re
import struct
from typing import Any, cast

from PIL import Image

ORIENTATION = 0x112  # TIFF 6.0, page 36; EXIF 2.3, table 4
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
UPRIGHT = 1
IN_XMP = re.compile(rb"tiff:Orientation(?:\s*=\s*[\"']|>)\s*([1-8])")
# Types of EXIF -> struct's letter.
NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 11: "f", 12: "d", 13: "I", 16: "Q", 17: "q", 18: "Q"}
TEXT, RATIONALS = 2, {5: "II", 10: "ii"}
ENTRY = 12  # bytes


def turned(picture: Image.Image, image: Image.Image) -> Image.Image:
    """Turn a picture as the loaded image that it was made from says."""
    turn = TURNS.get(orientation_of(image))
    return picture if turn is None else picture.transpose(turn)


def orientation_of(image: Image.Image) -> int:
    """Return the orientation of a loaded image, 1 to 8; 1, upright, if it states none or nonsense.

    Pillow turns a TIFF when it loads it, unless the type is odd.
    """
    tags: Any = getattr(image, "tag_v2", None)
    if tags is not None:
        try:
            stated = image.getexif().get(ORIENTATION)
        except Exception:  # Pillow raises many kinds of errors for odd tags
            return UPRIGHT
        return UPRIGHT if stated is None else _sound(stated)
    exif = image.info.get("exif") or _in_text(image.info.get("Raw profile type exif"))
    if isinstance(exif, bytes) and (stated := exif_orientation(exif)) is not None:
        return stated
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") or b""
    found = IN_XMP.search(xmp.encode(errors="replace") if isinstance(xmp, str) else bytes(xmp))
    return int(found[1]) if found else UPRIGHT


def exif_orientation(exif: bytes) -> int | None:
    """Find the orientation in EXIF's first directory: 1 to 8, whatever its type; 1 for nonsense; None if there is none.

    exif: a TIFF header and directories, with or without "Exif" before them.
    """
    body = re.sub(rb"^(?:Exif\0\0)+", b"", exif)
    order = {b"II": "<", b"MM": ">"}.get(body[:2])
    try:
        if order is None:
            return None
        (start,) = struct.unpack_from(f"{order}I", body, 4)
        (count,) = struct.unpack_from(f"{order}H", body, start)
        for place in range(start + 2, start + 2 + count * ENTRY, ENTRY):
            tag, kind, length = struct.unpack_from(f"{order}HHI", body, place)
            if tag == ORIENTATION:
                return _sound(_value(body, order, kind, length, place + 8))
    except struct.error:  # cut short
        pass
    return None


def _value(body: bytes, order: str, kind: int, length: int, place: int) -> Any:
    """Read the first value of an entry, whose bytes are at `place`, or where that points if they do not fit there."""
    letter = RATIONALS.get(kind) or NUMBERS.get(kind, "H")
    size = 1 if kind == TEXT else struct.calcsize(f"{order}{letter}")
    if size * length > 4 and kind in (TEXT, *NUMBERS, *RATIONALS):
        (place,) = struct.unpack_from(f"{order}I", body, place)
    if kind == TEXT or (NUMBERS.get(kind) == "B" and length > 1):
        return body[place : place + min(length, 16)]
    found = struct.unpack_from(f"{order}{letter}", body, place)
    return found[0] / (found[1] or 1) if kind in RATIONALS else found[0]


def _sound(value: Any) -> int:
    """Return an orientation of any type as a number from 1 to 8; 1 for nonsense."""
    if isinstance(value, tuple):
        values = cast("tuple[Any, ...]", value)
        value = values[0] if values else UPRIGHT
    if isinstance(value, bytes):
        digits = value.strip(b"\0 ")
        value = digits[0] % 0x30 if len(digits) == 1 else digits.decode("latin-1")
    try:
        number = float(value)
    except (TypeError, ValueError):
        return UPRIGHT
    return int(number) if number in range(1, 9) else UPRIGHT


def _in_text(profile: Any) -> bytes:
    """Return the EXIF that older programs write in hexadecimal into a PNG's text."""
    try:
        return bytes.fromhex("".join(profile.split("\n")[3:]))
    except (AttributeError, ValueError):
        return b""
