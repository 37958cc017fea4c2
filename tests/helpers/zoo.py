"""A zoo of odd pictures, each with what it shows or why it is not read.

Every mode, depth, orientation, profile, animation, form of transparency and damage. Files are made on the spot, and
what they show is computed without decoders.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from helpers.profiles import adobe_rgb, cmyk, encoded, from_adobe_rgb, gamma_grey, swapped

Levels = np.ndarray[Any, Any]
HIGH, WIDE = 6, 10
RNG = np.random.default_rng(7)
COLOURS: Levels = RNG.integers(20, 236, (HIGH, WIDE, 3), dtype=np.uint8)
GREYS: Levels = RNG.integers(0, 256, (HIGH, WIDE), dtype=np.uint8)
DEEP: Levels = RNG.integers(0, 65536, (HIGH, WIDE), dtype=np.uint16)
DEEP_COLOURS: Levels = RNG.integers(0, 65536, (HIGH, WIDE, 3), dtype=np.uint16)
ALPHA: Levels = RNG.integers(1, 255, (HIGH, WIDE), dtype=np.uint8)
BITS: Levels = RNG.integers(0, 2, (HIGH, WIDE), dtype=np.uint8)
FOUR: Levels = np.kron(np.array([[0, 1], [2, 3]], np.uint8), np.ones((16, 16), np.uint8))  # for lossy formats
CORNERS: Levels = np.array([[250, 10, 10], [10, 250, 10], [10, 10, 250], [240, 240, 20]], np.uint8)[FOUR]


@dataclass(frozen=True, kw_only=True)
class Odd:
    """A picture's file, and either what it shows or the reason, a regular expression, why it is not read."""

    name: str
    data: bytes
    extension: str = "png"
    shows: Levels | None = None  # H x W x 4, uint8: sRGB and alpha
    within: int = 0  # levels that each value may differ
    lossy: bool = False  # so that only the middle of each block of CORNERS is compared
    reason: str = ""
    opens: bool = True  # whether Pillow alone opens and loads it

    def differs(self, found: Levels, shows: Levels) -> float:
        """The largest difference of values H x W x C, where they can be seen."""
        where = np.ix_([*range(5, 11), *range(21, 27)], [*range(5, 11), *range(21, 27)]) if self.lossy else ...
        return np.abs(found[where].astype(float) - shows[where]).max()

    def over_white(self) -> Levels:
        """H x W x 3, float: what is shown on white paper."""
        assert self.shows is not None
        alpha = self.shows[..., 3:] / 255
        return self.shows[..., :3] * alpha + 255 * (1 - alpha)


def rgba(colours: Levels, alpha: Levels | int = 255) -> Levels:
    """H x W (x 3) and H x W -> H x W x 4."""
    shown = colours if colours.ndim == 3 else np.repeat(colours[..., None], 3, -1)
    return np.dstack([shown, np.broadcast_to(np.asarray(alpha), shown.shape[:2])]).astype(np.uint8)


def saved(image: Image.Image, format: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **how)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: Sequence[bytes], **chunks: bytes) -> bytes:
    """A PNG of any kind. chunks: tRNS, PLTE and so on, before the pixels."""

    def chunk(name: str, data: bytes) -> bytes:
        body = name.encode() + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk("IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    further = b"".join(chunk(name, data) for name, data in chunks.items())
    pixels = chunk("IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + further + pixels + chunk("IEND", b"")


def packed(values: Levels, bits: int) -> list[bytes]:
    """Rows of samples of 1, 2 or 4 bits."""
    spread = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return [np.packbits(row.reshape(-1)).tobytes() for row in spread.astype(np.uint8)]


def tiff(
    values: Levels, photometric: int, *, order: str = "<", more: dict[int, tuple[int, int]] | None = None
) -> bytes:
    """A TIFF without compression of H x W (x C) values. more: tag -> type and value, of short tags."""
    height, width, *channels = values.shape
    count, bits = (channels or [1])[0], values.dtype.itemsize * 8
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    end = 8 + len(data)
    entries: dict[int, tuple[int, int, int]] = {
        256: (4, 1, width), 257: (4, 1, height), 258: (3, count, bits), 259: (3, 1, 1), 262: (3, 1, photometric),
        273: (4, 1, 8), 277: (3, 1, count), 278: (4, 1, height), 279: (4, 1, len(data)), 339: (3, count, kind),
    }  # fmt: skip
    entries |= {tag: (type, 1, value) for tag, (type, value) in (more or {}).items()}
    listing, extra = b"", b""
    after = end + 2 + 12 * len(entries) + 4
    for tag, (type, number, value) in sorted(entries.items()):
        if type == 3 and number > 2:
            held = struct.pack(f"{order}I", after + len(extra))
            extra += struct.pack(f"{order}{number}H", *[value] * number)
        else:
            held = struct.pack(f"{order}{number}H", *[value] * number) if type == 3 else struct.pack(f"{order}I", value)
        listing += struct.pack(f"{order}HHI", tag, type, number) + held.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", end)
    return head + data + struct.pack(f"{order}H", len(entries)) + listing + bytes(4) + extra


def exif(*entries: tuple[int, int, int, bytes], order: str = "<", data: bytes = b"") -> bytes:
    """EXIF with one directory of (tag, type, count, four bytes); `data` follows it, at 14 + 12 x entries."""
    body = b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3].ljust(4, b"\0") for entry in entries)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return b"Exif\0\0" + head + struct.pack(f"{order}H", len(entries)) + body + bytes(4) + data


def jpeg_with(exif: bytes) -> bytes:
    plain = saved(Image.fromarray(CORNERS), "JPEG", quality=100, subsampling=0)
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + plain[2:]


def turned(shown: Levels, orientation: int) -> Levels:
    """What is seen of stored pixels: EXIF 2.3, table 4 (row 0 and column 0 are at top, right, ...)."""
    flips = {2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}  # rows, columns
    seen = shown.swapaxes(0, 1) if orientation >= 5 else shown
    rows, columns = flips.get(orientation, (0, 0))
    return seen[:: -1 if rows else 1, :: -1 if columns else 1]


def ways_up() -> Iterator[Odd]:
    for way in range(1, 9):
        tag = Image.Exif()
        tag[0x112] = way
        image, shows = Image.fromarray(COLOURS), turned(rgba(COLOURS), way)
        yield Odd(name=f"PNG, orientation {way}", data=saved(image, "PNG", exif=tag), shows=shows)
        webp = saved(image, "WEBP", exif=tag, lossless=True)
        yield Odd(name=f"WebP, orientation {way}", data=webp, extension="webp", shows=shows)
        own = tiff(COLOURS, 2, more={0x112: (3, way)})
        yield Odd(name=f"TIFF, orientation {way}", data=own, extension="tif", shows=shows)
        seen = turned(rgba(CORNERS), way)
        turn = exif((0x112, 3, 1, struct.pack(">H", way)), order=">")
        yield Odd(name=f"JPEG, orientation {way}", data=jpeg_with(turn), extension="jpg", shows=seen, within=6)
    avif = saved(Image.fromarray(CORNERS), "AVIF", exif=exif((0x112, 3, 1, b"\6")), quality=100)
    yield Odd(name="AVIF, turned", data=avif, extension="avif", shows=turned(rgba(CORNERS), 6), within=8, lossy=True)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = saved(Image.fromarray(COLOURS), "WEBP", xmp=xmp, lossless=True)
    yield Odd(name="orientation in XMP", data=data, extension="webp", shows=turned(rgba(COLOURS), 6))
    own = tiff(COLOURS, 2, more={0x112: (1, 6)})
    yield Odd(name="TIFF, orientation as a byte", data=own, extension="tif", shows=turned(rgba(COLOURS), 6))


def odd_exif() -> Iterator[Odd]:
    """Orientation 6 in all types, and next to tags of wrong types; and what means upright."""
    six = (0x112, 3, 1, b"\6")
    at = struct.pack("<I", 26)  # behind one entry
    types = {
        "byte": (1, 1, b"\6"), "text": (2, 2, b"6\0"), "short": (3, 1, b"\6"), "long": (4, 1, b"\6"),
        "signed byte": (6, 1, b"\6"), "undefined": (7, 1, b"\6"), "undefined of 2": (7, 2, b"\6\0"),
        "signed short": (8, 1, b"\6"), "signed long": (9, 1, b"\6"), "float": (11, 1, struct.pack("<f", 6)),
        "directory": (13, 1, b"\6"), "type 99": (99, 1, b"\6"), "two shorts": (3, 2, b"\6\0\6\0"),
    }  # fmt: skip
    turned_ = {f"as {name}": exif((0x112, *given)) for name, given in types.items()}
    turned_["as rational"] = exif((0x112, 5, 1, at), data=struct.pack("<II", 12, 2))
    turned_["as signed rational"] = exif((0x112, 10, 1, at), data=struct.pack("<ii", 6, 1))
    turned_["as double"] = exif((0x112, 12, 1, at), data=struct.pack("<d", 6))
    turned_["as long text"] = exif((0x112, 2, 6, at), data=b"6\0\0\0\0\0")
    for tag, kind, count, value in [
        (0x100, 1, 1, 0x26), (0x102, 4, 1, 0xFFFFFFFF), (0x2BC, 2, 8, 0x26), (0x11A, 11, 1, 0xFFFFFFFF),
        (0x10F, 2, 0xFFFFFF, 0x26), (0x10F, 2, 0xFFFFFFFF, 0xFFFFFFFF), (0x110, 200, 7, 3), (0x8769, 4, 1, 0xFFFFFFFF),
        (0x8825, 2, 3, 0x26), (0x9286, 5, 1, 0x7FFFFFFF), (0x111, 12, 0, 0), (0x13B, 7, 0, 0),
    ]:  # fmt: skip
        both = sorted([six, (tag, kind, count, struct.pack("<I", value))])
        turned_[f"beside tag {tag:#x} of type {kind}, {count}"] = exif(*both, data=b"A" * 64)
    turned_["twice with its mark"] = b"Exif\0\0" + exif(six)
    upright = {
        "zero": exif((0x112, 3, 1, b"\0")), "nine": exif((0x112, 3, 1, b"\x09")),
        "huge": exif((0x112, 4, 1, b"\xff" * 4)),
        "a word": exif((0x112, 2, 4, b"top\0")), "a fraction": exif((0x112, 11, 1, struct.pack("<f", 6.5))),
        "not a number": exif((0x112, 11, 1, struct.pack("<f", float("nan")))), "nothing": exif((0x112, 7, 0, b"")),
        "cut short": exif(six)[:20], "without a directory": b"Exif\0\0II*\0\xff\xff\xff\x7f",
        "of zeros": b"Exif\0\0" + bytes(40),
        "empty": b"Exif\0\0", "0 divided by 0": exif((0x112, 5, 1, at), data=bytes(8)),
    }  # fmt: skip
    for name, data in turned_.items():
        shows = turned(rgba(CORNERS), 6)
        yield Odd(name=f"EXIF, {name}", data=jpeg_with(data), extension="jpg", shows=shows, within=6)
    for name, data in upright.items():
        yield Odd(name=f"EXIF, {name}", data=jpeg_with(data), extension="jpg", shows=rgba(CORNERS), within=6)


def pngs() -> Iterator[Odd]:
    rows16 = [row.astype(">u2").tobytes() for row in DEEP_COLOURS]
    for depth, white in ((1, 1), (2, 3), (4, 15)):
        values, scale = GREYS >> (8 - depth), 255 // white
        rows, key = packed(values, depth), int(values[0, 0])
        yield Odd(name=f"PNG, {depth} bits of grey", data=png(WIDE, HIGH, depth, 0, rows), shows=rgba(values * scale))
        keyed = png(WIDE, HIGH, depth, 0, rows, tRNS=struct.pack(">H", key))
        shows = rgba(values * scale, np.where(values == key, 0, 255))
        yield Odd(name=f"PNG, {depth} bits of grey with a key", data=keyed, shows=shows)
        palette = bytes(range(3 * (white + 1)))
        shown = np.frombuffer(palette, np.uint8).reshape(-1, 3)[values]
        yield Odd(
            name=f"PNG, palette of {depth} bits", data=png(WIDE, HIGH, depth, 3, rows, PLTE=palette), shows=rgba(shown)
        )
    rows8, key = [row.tobytes() for row in GREYS], int(GREYS[2, 2])
    palette = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    faded = RNG.integers(0, 256, 256, dtype=np.uint8)
    yield Odd(name="PNG, grey", data=png(WIDE, HIGH, 8, 0, rows8), shows=rgba(GREYS))
    data = png(WIDE, HIGH, 8, 0, rows8, tRNS=struct.pack(">H", key))
    yield Odd(name="PNG, grey with a key", data=data, shows=rgba(GREYS, np.where(GREYS == key, 0, 255)))
    data = png(WIDE, HIGH, 8, 3, rows8, PLTE=palette.tobytes(), tRNS=faded.tobytes())
    yield Odd(name="PNG, palette that fades", data=data, shows=rgba(palette[GREYS], faded[GREYS]))
    data = png(WIDE, HIGH, 8, 3, rows8, PLTE=palette.tobytes(), tRNS=b"\xff" * key + b"\0")
    shows = rgba(palette[GREYS], np.where(GREYS == key, 0, 255))
    yield Odd(name="PNG, palette with one hole", data=data, shows=shows)
    data = png(WIDE, HIGH, 8, 2, [row.tobytes() for row in COLOURS], tRNS=struct.pack(">3H", *COLOURS[3, 3].tolist()))
    shows = rgba(COLOURS, np.where((COLOURS == COLOURS[3, 3]).all(-1), 0, 255))
    yield Odd(name="PNG, colour with a key", data=data, shows=shows)
    deep = [row.astype(">u2").tobytes() for row in DEEP]
    yield Odd(name="PNG, 16 bits of grey", data=png(WIDE, HIGH, 16, 0, deep), shows=rgba(DEEP >> 8))
    data = png(WIDE, HIGH, 16, 0, deep, tRNS=struct.pack(">H", int(DEEP[1, 1])))
    shows = rgba(DEEP >> 8, np.where(DEEP == DEEP[1, 1], 0, 255))
    yield Odd(name="PNG, 16 bits of grey with a key", data=data, shows=shows)
    yield Odd(name="PNG, 16 bits of colour", data=png(WIDE, HIGH, 16, 2, rows16), shows=rgba(DEEP_COLOURS >> 8))
    data = png(WIDE, HIGH, 16, 2, rows16, tRNS=struct.pack(">3H", *DEEP_COLOURS[1, 1].tolist()))
    shows = rgba(DEEP_COLOURS >> 8, np.where((DEEP_COLOURS == DEEP_COLOURS[1, 1]).all(-1), 0, 255))
    yield Odd(name="PNG, 16 bits of colour with a key", data=data, shows=shows)
    for colour, values in ((4, np.dstack([DEEP, DEEP_COLOURS[..., 0]])), (6, np.dstack([DEEP_COLOURS, DEEP]))):
        data = png(WIDE, HIGH, 16, colour, [row.astype(">u2").tobytes() for row in values])
        shows = rgba((values[..., 0] if colour == 4 else values[..., :3]) >> 8, values[..., -1] >> 8)
        yield Odd(name=f"PNG, 16 bits with alpha, colour type {colour}", data=data, shows=shows)
    data = png(WIDE, HIGH, 8, 4, [row.tobytes() for row in np.dstack([GREYS, ALPHA])])
    yield Odd(name="PNG, grey with alpha", data=data, shows=rgba(GREYS, ALPHA))
    for name, alpha in (("alpha", ALPHA), ("alpha that is opaque", 255), ("alpha that is empty", 0)):
        data = saved(Image.fromarray(rgba(COLOURS, alpha)), "PNG")
        yield Odd(name=f"PNG, {name}", data=data, shows=rgba(COLOURS, alpha))


def odd_metadata() -> Iterator[Odd]:
    """Sound pixels with metadata that Pillow cannot read."""
    rows, upright = [row.tobytes() for row in COLOURS], rgba(COLOURS)
    turn = exif((0x112, 3, 1, b"\6"))
    chunks = {
        "cHRM": b"\0\1", "pHYs": b"", "gAMA": b"a", "sRGB": b"", "iCCP": b"a", "zTXt": b"a\0",
        "fcTL": b"a", "acTL": b"",
    }  # fmt: skip
    for name, body in chunks.items():
        data = png(WIDE, HIGH, 8, 2, rows, **{name: body})
        yield Odd(name=f"PNG, odd {name}", data=data, shows=upright, opens=False)
        data = png(WIDE, HIGH, 8, 2, rows, eXIf=turn[6:], **{name: body})
        yield Odd(name=f"PNG, odd {name}, turned", data=data, shows=turned(upright, 6), opens=False)
    spoilt = png(WIDE, HIGH, 8, 2, rows, tEXt=b"a\0bc").replace(b"a\0bc", b"a\0bd")
    yield Odd(name="PNG, text with a wrong sum", data=spoilt, shows=upright, opens=False)
    segments = {
        "short JFIF": (0xE0, b"JFIF\0"), "short Adobe": (0xEE, b"Adobe\0"),
        "short profile": (0xE2, b"ICC_PROFILE\0"),
        "odd Photoshop": (0xED, b"Photoshop 3.0\0008BIM\4\4\1\1\1\1\1"), "odd MPF": (0xE2, b"MPF\0II*\0"),
    }  # fmt: skip
    plain = jpeg_with(turn)
    for name, (marker, body) in segments.items():
        data = plain[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + plain[2:]
        shows = turned(rgba(CORNERS), 6)
        yield Odd(name=f"JPEG, {name}", data=data, extension="jpg", shows=shows, within=6, opens=False)
    for tag, kind, value in ((0x2BC, 4, 7), (0x8769, 6, 0xFF), (0x10E, 5, 0xFFFFFFFF), (0x8825, 6, 0xFF)):
        data = tiff(COLOURS, 2, more={tag: (kind, value), 0x112: (3, 8)})
        yield Odd(name=f"TIFF, odd tag {tag:#x}", data=data, extension="tif", shows=turned(upright, 8), opens=False)


def profiles() -> Iterator[Odd]:
    image, adobe = Image.fromarray(COLOURS), adobe_rgb()
    seen = rgba(from_adobe_rgb(COLOURS))
    for format, extension in (("PNG", "png"), ("TIFF", "tiff")):
        data = saved(image, format, icc_profile=adobe)
        yield Odd(name=f"{format}, Adobe RGB", data=data, extension=extension, shows=seen, within=1)
    data = saved(image, "WEBP", icc_profile=adobe, lossless=True)
    yield Odd(name="WebP, Adobe RGB", data=data, extension="webp", shows=seen, within=1)
    blocks = Image.fromarray(CORNERS)
    data = saved(blocks, "JPEG", icc_profile=adobe, quality=100, subsampling=0)
    yield Odd(
        name="JPEG, Adobe RGB", data=data, extension="jpg", shows=rgba(from_adobe_rgb(CORNERS)), within=12, lossy=True
    )
    data = saved(blocks, "AVIF", icc_profile=adobe, quality=100)
    yield Odd(
        name="AVIF, Adobe RGB", data=data, extension="avif", shows=rgba(from_adobe_rgb(CORNERS)), within=12, lossy=True
    )
    data = saved(Image.fromarray(rgba(COLOURS, ALPHA)), "PNG", icc_profile=adobe)
    yield Odd(name="PNG, Adobe RGB with alpha", data=data, shows=rgba(from_adobe_rgb(COLOURS), ALPHA), within=1)
    palette = image.quantize(8)
    shown = np.asarray(palette.convert("RGB"))
    data = saved(palette, "PNG", icc_profile=adobe)
    yield Odd(name="PNG, Adobe RGB palette", data=data, shows=rgba(from_adobe_rgb(shown)), within=1)
    tag = Image.Exif()
    tag[0x112] = 8
    data = saved(image, "PNG", icc_profile=adobe, exif=tag)
    yield Odd(name="PNG, Adobe RGB and turned", data=data, shows=turned(seen, 8), within=1)
    data = saved(image, "PNG", icc_profile=swapped())
    yield Odd(name="PNG, red and green swapped", data=data, shows=rgba(COLOURS[..., [1, 0, 2]]), within=1)
    grey = Image.fromarray(GREYS)
    light = encoded((GREYS / 255) ** 1.8)
    data = saved(grey, "PNG", icc_profile=gamma_grey(1.8))
    yield Odd(name="PNG, grey of gamma 1.8", data=data, shows=rgba(light), within=2)
    data = saved(Image.fromarray(np.dstack([GREYS, ALPHA])), "PNG", icc_profile=gamma_grey(1.8))
    yield Odd(name="PNG, grey of gamma 1.8 with alpha", data=data, shows=rgba(light, ALPHA), within=2)
    shown = from_adobe_rgb(np.repeat(GREYS[..., None], 3, -1))
    data = saved(grey, "PNG", icc_profile=adobe)
    yield Odd(name="PNG, grey in Adobe RGB", data=data, shows=rgba(shown), within=1)
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    yield Odd(name="PNG, sRGB by profile", data=saved(image, "PNG", icc_profile=own), shows=rgba(COLOURS))
    for name, other in {
        "broken profile": b"no profile at all", "profile cut short": adobe[:200],
        "profile without tags": adobe[:128] + bytes(4),
        "profile of grey": gamma_grey(1), "profile of CMYK": cmyk(),
    }.items():  # fmt: skip
        yield Odd(name=f"PNG, {name}", data=saved(image, "PNG", icc_profile=other), shows=rgba(COLOURS))
    inks = Image.fromarray(rgba(COLOURS, ALPHA // 4)).convert("RGBA")
    inks = Image.merge("CMYK", inks.split())
    naive = np.asarray(inks.convert("RGB"))
    yield Odd(name="TIFF, CMYK", data=saved(inks, "TIFF"), extension="tif", shows=rgba(naive))
    theirs: Any = ImageCms.profileToProfile(
        inks, ImageCms.ImageCmsProfile(io.BytesIO(cmyk())), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    data = saved(inks, "TIFF", icc_profile=cmyk())
    yield Odd(name="TIFF, CMYK by profile", data=data, extension="tif", shows=rgba(np.asarray(theirs)))
    data = saved(inks, "TIFF", icc_profile=adobe)
    yield Odd(name="TIFF, CMYK with a profile of RGB", data=data, extension="tif", shows=rgba(naive))
    red = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    data = saved(red, "JPEG", quality=100)
    inked: Any = ImageCms.profileToProfile(
        red, ImageCms.ImageCmsProfile(io.BytesIO(cmyk())), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    by_profile = saved(red, "JPEG", quality=100, icc_profile=cmyk())
    shows = rgba(np.asarray(inked))
    yield Odd(name="JPEG, CMYK by profile", data=by_profile, extension="jpg", shows=shows, within=6)
    yield Odd(name="JPEG, CMYK", data=data, extension="jpg", shows=rgba(np.full((32, 32, 3), (255, 0, 0))), within=3)
    lab: Any = ImageCms.profileToProfile(
        image, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    yield Odd(name="TIFF, Lab", data=saved(lab, "TIFF"), extension="tif", shows=rgba(COLOURS), within=12)


def tiffs() -> Iterator[Odd]:
    def of(name: str, data: bytes, shows: Levels | None = None, **more: Any) -> Odd:
        return Odd(name=f"TIFF, {name}", data=data, extension="tiff", shows=shows, **more)

    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield of(compression, saved(Image.fromarray(COLOURS), "TIFF", compression=compression), rgba(COLOURS))
    yield of(
        "fax of 1 bit", saved(Image.fromarray(BITS * 255).convert("1"), "TIFF", compression="group4"), rgba(BITS * 255)
    )
    for order, end in (("<", "little"), (">", "big")):
        yield of(f"16 bits, {end} end first", tiff(DEEP, 1, order=order), rgba(DEEP >> 8))
        yield of(f"16 bits of colour, {end} end first", tiff(DEEP_COLOURS, 2, order=order), rgba(DEEP_COLOURS >> 8))
        floats = (DEEP / 65535).astype(np.float32)
        yield of(f"float, {end} end first", tiff(floats, 1, order=order), rgba(np.rint(floats * 255)))
    signed = (DEEP >> 1).astype(np.int16)
    yield of("signed 16 bits", tiff(signed, 1), rgba(signed >> 7))
    yield of("signed 16 bits below zero", tiff(signed - 20000, 1), reason="in whole numbers from -.* white is unknown")
    yield of("white is zero", tiff(GREYS, 0), rgba(255 - GREYS))
    yield of("white is zero, 16 bits", tiff(DEEP, 0), rgba(255 - (DEEP >> 8)))
    yield of("white is zero, float", tiff(floats, 0), rgba(255 - np.rint(floats * 255)))
    yield of("32 bits", tiff(DEEP.astype(np.uint32), 1), reason="its grey is in 32 bits from .* convert it to 16 bits")
    wild = floats * 3000
    yield of("float that is no grey", tiff(wild, 1), reason="in floating point from .* expected 0 to 1: scale it")
    wild = np.where(floats == floats[0, 0], np.nan, floats).astype(np.float32)
    yield of("float, not a number", tiff(wild, 1), reason="in floating point from nan to nan, expected 0 to 1")
    bright = floats * 1.25 - np.float32(0.1)
    yield of("float, a little too bright", tiff(bright, 1), rgba(np.rint(bright.clip(0, 1) * 255)))
    weighted = np.rint(COLOURS * (ALPHA[..., None] / 255)).astype(np.uint8)
    shows = rgba(np.minimum(np.rint(weighted * 255.0 / ALPHA[..., None]), 255), ALPHA)
    yield of("multiplied by its alpha", tiff(np.dstack([weighted, ALPHA]), 2, more={338: (3, 1)}), shows, within=1)
    yield of("alpha beside colour", tiff(np.dstack([COLOURS, ALPHA]), 2, more={338: (3, 2)}), rgba(COLOURS, ALPHA))
    yield of("a channel without meaning", tiff(np.dstack([COLOURS, ALPHA]), 2, more={338: (3, 0)}), rgba(COLOURS))
    pages = [Image.fromarray(COLOURS), Image.new("RGB", (WIDE, HIGH), "red")]
    yield of("of two pages", saved(pages[0], "TIFF", save_all=True, append_images=pages[1:]), rgba(COLOURS))


def other_formats() -> Iterator[Odd]:
    image, alpha = Image.fromarray(COLOURS), Image.fromarray(rgba(COLOURS, ALPHA))
    red = Image.new("RGB", (WIDE, HIGH), "red")
    indexed = image.quantize(16)
    shown = np.asarray(indexed.convert("RGB"))
    for format, extension in (("GIF", "gif"), ("BMP", "bmp"), ("TGA", "tga"), ("TIFF", "tif")):
        yield Odd(name=f"{format}, palette", data=saved(indexed, format), extension=extension, shows=rgba(shown))
    index = np.asarray(indexed)
    hole = rgba(shown, np.where(index == index[0, 0], 0, 255))
    data = saved(indexed, "GIF", transparency=int(index[0, 0]), interlace=1)
    yield Odd(name="GIF, with a hole", data=data, extension="gif", shows=hole)
    for format, extension, how in (("GIF", "gif", {}), ("WEBP", "webp", {"lossless": True}), ("PNG", "apng", {})):
        data = saved(indexed if format == "GIF" else image, format, save_all=True, append_images=[red, red], **how)
        yield Odd(
            name=f"{format}, in motion",
            data=data,
            extension=extension,
            shows=rgba(shown if format == "GIF" else COLOURS),
        )
    data = saved(alpha, "WEBP", lossless=True, exact=True)
    yield Odd(name="WebP, alpha", data=data, extension="webp", shows=rgba(COLOURS, ALPHA))
    for format, extension in (("BMP", "bmp"), ("TGA", "tga"), ("PPM", "ppm"), ("JPEG2000", "jp2")):
        yield Odd(name=f"{format}, colour", data=saved(image, format), extension=extension, shows=rgba(COLOURS))
        grey = saved(Image.fromarray(GREYS), format)
        yield Odd(name=f"{format}, grey", data=grey, extension=extension, shows=rgba(GREYS))
    for format, extension in (("TGA", "tga"), ("JPEG2000", "jp2"), ("TIFF", "tif")):
        yield Odd(name=f"{format}, alpha", data=saved(alpha, format), extension=extension, shows=rgba(COLOURS, ALPHA))
    data = saved(image, "TGA", compression="tga_rle")
    yield Odd(name="TGA, run lengths", data=data, extension="tga", shows=rgba(COLOURS))
    head = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, WIDE, HIGH, 32, 0x20)
    data = head + np.dstack([COLOURS[..., ::-1], np.zeros_like(ALPHA)]).tobytes()
    yield Odd(name="TGA, fourth byte without meaning", data=data, extension="tga", shows=rgba(COLOURS))
    data = saved(Image.fromarray(BITS * 255).convert("1"), "BMP")
    yield Odd(name="BMP, 1 bit", data=data, extension="bmp", shows=rgba(BITS * 255))
    data = saved(Image.fromarray(DEEP), "JPEG2000")
    yield Odd(name="JPEG 2000, 16 bits", data=data, extension="jp2", shows=rgba(DEEP >> 8))
    corners = Image.fromarray(CORNERS)
    for format, extension, how in (
        ("JPEG", "jpg", {"progressive": True}), ("WEBP", "webp", {}), ("AVIF", "avif", {}), ("JPEG2000", "j2k", {}),
    ):  # fmt: skip
        data = (
            saved(corners, format, quality=100, **how) if format != "JPEG2000" else saved(corners, format, no_jp2=True)
        )
        yield Odd(name=f"{format}, lossy", data=data, extension=extension, shows=rgba(CORNERS), within=8, lossy=True)
    faded = np.where(FOUR == 2, 0, 255).astype(np.uint8)
    data = saved(Image.fromarray(rgba(CORNERS, faded)), "AVIF", quality=100)
    yield Odd(name="AVIF, alpha", data=data, extension="avif", shows=rgba(CORNERS, faded), within=8, lossy=True)


def netpbm() -> Iterator[Odd]:
    def of(name: str, head: str, body: bytes, shows: Levels | None = None, **more: Any) -> Odd:
        return Odd(name=f"Netpbm, {name}", data=head.encode() + body, extension="ppm", shows=shows, **more)

    size = f"{WIDE} {HIGH}"
    text = " ".join(map(str, BITS.reshape(-1).tolist())).encode()
    yield of("P1", f"P1\n# a comment\n{size}\n", text, rgba(255 - BITS * 255))
    yield of("P2", f"P2 {size} 255\n", " ".join(map(str, GREYS.reshape(-1).tolist())).encode(), rgba(GREYS))
    yield of("P3", f"P3 {size} 255\n", " ".join(map(str, COLOURS.reshape(-1).tolist())).encode(), rgba(COLOURS))
    yield of("P4", f"P4 {size}\n", b"".join(packed(BITS, 1)), rgba(255 - BITS * 255))
    yield of("P5 of 16 bits", f"P5 {size} 65535\n", DEEP.astype(">u2").tobytes(), rgba(DEEP >> 8))
    dark = DEEP % 200  # of 16 bits all the same
    yield of("P5 of 16 bits, dark", f"P5 {size} 65535\n", dark.astype(">u2").tobytes(), rgba(dark >> 8))
    yield of("P5 of 4 bits", f"P5 {size} 15\n", (GREYS >> 4).tobytes(), rgba((GREYS >> 4) * 17))
    yield of(
        "P6 of 16 bits", f"P6 {size} 65535\n", DEEP_COLOURS.astype(">u2").tobytes(), rgba(DEEP_COLOURS >> 8), within=1
    )
    floats = (DEEP / 65535).astype(np.float32)
    yield of("PFM", f"Pf\n{size}\n-1.0\n", floats[::-1].astype("<f4").tobytes(), rgba(np.rint(floats * 255)))
    yield of("PFM, cut short", f"Pf\n{size}\n-1.0\n", floats.tobytes()[:-8], reason="truncated|not enough")
    yield of("PFM of colour", f"PF\n{size}\n-1.0\n", bytes(12 * WIDE * HIGH), reason="it is no JPEG, PNG, WebP, GIF,")


def damaged() -> Iterator[Odd]:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for format, extension in (
        ("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tif"),
        ("AVIF", "avif"),
        ("JPEG2000", "jp2"), ("PPM", "ppm"), ("TGA", "tga"),
    ):  # fmt: skip
        data = saved(image, format)
        for part in (0.9, 0.5):
            cut = data[: int(len(data) * part)]
            yield Odd(name=f"{format}, cut at {part}", data=cut, extension=extension, reason=".")
        yield Odd(name=f"{format}, its head alone", data=data[:20], extension=extension, reason=".")
    spoilt = bytearray(saved(image, "PNG"))
    spoilt[len(spoilt) // 2] ^= 0xFF
    yield Odd(name="PNG, a byte changed", data=bytes(spoilt), reason=".")
    huge = png(20_000, 20_000, 8, 2, [])
    yield Odd(name="PNG, huge by its head", data=huge, reason=r"pixels")
    yield Odd(
        name="PNG, 8001 x 8000",
        data=png(8001, 8000, 8, 2, []),
        reason="8001 x 8000 pixels, expected at most 64,000,000",
    )


def no_pictures() -> Iterator[Odd]:
    ftyp = b"\0\0\0\x18ftyp%s\0\0\0\0mif1%s" + bytes(64)
    for name, data, extension, reason in (
        ("nothing", b"", "jpg", "it is empty"),
        ("zeros", bytes(100), "jpg", "it is no JPEG"),
        ("a text", b"not a picture", "png", "it is no JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000, PPM or TGA"),
        ("a web page", b"\n<!DOCTYPE html><html>404</html>", "jpg", "a web page: download the picture itself"),
        (
            "SVG",
            b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
            "png",
            "it is SVG, .* convert it to PNG",
        ),
        (
            "EPS",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "jpg",
            "it is EPS or PostScript, which only a program",
        ),
        ("EPS for DOS", b"\xc5\xd0\xd3\xc6" + bytes(60), "jpg", "it is EPS, which only a program can draw"),
        ("PDF", b"%PDF-1.7\n", "jpg", "it is PDF, which only a program can draw"),
        ("WMF", b"\xd7\xcd\xc6\x9a" + bytes(60), "bmp", "it is WMF, which only a program can draw"),
        ("PSD", b"8BPS\0\1" + bytes(60), "png", "it is Photoshop's PSD: convert it to PNG"),
        ("icon", saved(Image.new("RGB", (16, 16)), "ICO"), "png", "an icon .ICO.: convert it to PNG"),
        ("JPEG XL", b"\xff\x0a" + bytes(60), "jpg", "it is JPEG XL: convert it to PNG"),
        ("OpenEXR", b"v/1\1" + bytes(60), "tif", "it is OpenEXR: convert it to PNG"),
        ("zip", b"PK\3\4" + bytes(60), "png", "it is a zip archive: unpack it"),
        ("HEIC", ftyp % (b"heic", b"heic"), "heic", "it is HEIC, .*: pip install pillow-heif"),
        ("HEIF", ftyp % (b"mif1", b"heix"), "heif", "it is HEIC, .*: pip install pillow-heif"),
        ("film", ftyp % (b"isom", b"mp41"), "png", "it is no JPEG"),
    ):
        yield Odd(name=f"no picture: {name}", data=data, extension=extension, reason=reason)


@cache
def zoo() -> tuple[Odd, ...]:
    """All of them, each with its own name."""
    groups = (ways_up, odd_exif, odd_metadata, pngs, profiles, tiffs, other_formats, netpbm, damaged, no_pictures)
    return tuple(odd for group in groups for odd in group())
