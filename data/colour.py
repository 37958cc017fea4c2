"""The colours of an image: any mode, depth, transparency and ICC profile -> 8 bits a channel in sRGB."""

from __future__ import annotations

import io
from functools import cache, lru_cache
from typing import Any, cast

import numpy as np
from PIL import Image

DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
GREY = ("1", "L", "LA", "La", *DEEP)
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # TIFF's
SPACES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}  # ICC's colour spaces -> modes
SAME = 2  # levels: a profile that moves no colour further is sRGB, and its pictures stay as they are
KEPT, LARGEST = 32, 8 << 20  # profiles, and bytes of one: those of presses have 3 MiB at most
MEANINGFUL = ("icc_profile", "exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif", "transparency")  # of an info


class UnknownWhiteError(ValueError):
    """Numbers of which it is not known which one is white."""


def srgb(image: Image.Image) -> Image.Image:
    """Convert to RGB in sRGB, or to RGBA if a pixel is not opaque, without any further information.

    Profiles of RGB, grey, CMYK and Lab are followed, perceptually. One that does not parse, or is for other channels,
    is ignored. Raises UnknownWhiteError, and whatever Pillow raises for damage.
    """
    packing = " ".join(str(tile[3]) for tile in getattr(image, "tile", ()))  # known until it is loaded
    image.load()
    if not any(key in image.info for key in MEANINGFUL):
        if image.mode == "RGB":
            return image if type(image) is Image.Image else image.copy()
        if image.mode == "RGBA" and type(image) is Image.Image and _alpha(image, None) is not None:
            return image
    profile = image.info.get("icc_profile")
    levels = _keyed(image, packing) if image.mode in DEEP or "transparency" in image.info else image
    picture = _by_profile(levels, profile if isinstance(profile, bytes) else b"", image.mode)
    if (alpha := _alpha(levels, image.format)) is not None:
        picture.putalpha(alpha)
    picture.info = {}
    return picture


def _alpha(levels: Image.Image, format: str | None) -> Image.Image | None:
    """Return the alpha channel; None if all is opaque."""
    if not levels.has_transparency_data:
        return None
    alpha = (levels.convert("LA") if levels.mode == "La" else levels.convert("RGBA")).getchannel("A")
    low, high = cast("tuple[int, int]", alpha.getextrema())
    without_meaning = high == 0 and format in ("TGA", "BMP")  # a fourth byte that is only padding
    return None if low == 255 or without_meaning else alpha


def _by_profile(levels: Image.Image, profile: bytes, mode: str) -> Image.Image:
    """Convert to RGB without alpha, by the profile if it is for these channels. mode: before the depth was reduced."""
    channels, transform = _to_srgb(profile) if 0 < len(profile) <= LARGEST else ("", None)
    fitting = ("L", "RGB") if mode in GREY else (mode if mode in ("CMYK", "LAB") else "RGB",)
    if mode == "LAB" and channels != mode:
        channels, transform = _to_srgb(_lab())
    if transform is None or channels not in fitting:
        return _plain(levels)
    return _cms().applyTransform(levels if levels.mode == channels else _plain(levels).convert(channels), transform)


def _plain(levels: Image.Image) -> Image.Image:
    """Convert to RGB as Pillow does, without alpha; transparent pixels keep their colours."""
    if levels.mode == "La":
        return levels.convert("LA").convert("RGB")
    if levels.has_transparency_data:
        return levels.convert("RGBA").convert("RGB")
    return levels.convert("RGB") if levels.mode != "RGB" else levels.copy()


@lru_cache(KEPT)
def _to_srgb(profile: bytes) -> tuple[str, Any]:
    """Return the mode that a profile is for, "" if it does not parse; and the transform, None if it changes nothing."""
    cms = _cms()
    try:
        source = cms.ImageCmsProfile(io.BytesIO(profile))
        mode = SPACES[source.profile.xcolor_space]
        transform = cms.buildTransform(source, cms.createProfile("sRGB"), mode, "RGB")
        if mode in ("RGB", "L"):
            steps = np.arange(0, 256, 15 if mode == "RGB" else 1, dtype=np.uint8)
            colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3) if mode == "RGB" else steps[None]
            probe = Image.fromarray(colours)
            moved = np.asarray(cms.applyTransform(probe, transform)).astype(int) - np.asarray(probe.convert("RGB"))
            transform = None if np.abs(moved).max() <= SAME else transform
    except Exception:  # for a malformed profile, of many kinds
        return "", None
    return mode, transform


@cache
def _lab() -> bytes:
    cms = _cms()
    return cms.ImageCmsProfile(cms.createProfile("LAB")).tobytes()


def _cms() -> Any:
    """Return Pillow's module for profiles, whose hints are incomplete. It is imported with the first profile."""
    from PIL import ImageCms

    return ImageCms


def _keyed(image: Image.Image, packing: str) -> Image.Image:
    """Reduce a loaded image to 8 bits, and the colour that counts as transparent, if there is one, likewise.

    packing: of its samples in the file, in Pillow's words, such as "L;4"; "" if it is not known.
    """
    key: Any = image.info.get("transparency")
    if image.mode in DEEP:
        values = np.asarray(image)
        grey = Image.fromarray(_levels(image, values, packing))
        if key is not None:
            grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
        return grey
    keyed = image.copy()
    if image.mode == "L":  # a PNG's key is as deep as its samples, which Pillow has scaled
        keyed.info["transparency"] = key * {"L;2": 85, "L;4": 17}.get(packing, 1)
    elif image.mode == "RGB" and (";16" in packing or max(key) > 255):  # of which Pillow keeps the upper bytes
        keyed.info["transparency"] = tuple(level >> 8 for level in key)
    return keyed


def _levels(image: Image.Image, values: np.ndarray[Any, Any], packing: str) -> np.ndarray[Any, Any]:
    """Scale numbers H x W to uint8, H x W. Raises UnknownWhiteError."""
    if image.mode == "F":
        levels = _from_float(values, in_file=image.format is not None)
    else:
        levels = (values >> _surplus_bits(image, values, packing)).astype(np.uint8)
    tags: Any = getattr(image, "tag_v2", {})
    return 255 - levels if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else levels


def _surplus_bits(image: Image.Image, values: np.ndarray[Any, Any], packing: str) -> int:
    """Count the bits above 8. An image of mode I that is not from a file has 8 or 16, whichever is enough."""
    low, high = int(values.min()), int(values.max())
    if ";12" in packing:
        return 4
    if image.mode != "I":
        return 8
    signed, wide = "16S" in packing or "16BS" in packing, ";32" in packing
    if low < 0 or high > 65535 or wide:
        depth = "32 bits" if wide else "whole numbers"
        raise UnknownWhiteError(
            f"its grey is in {depth} from {low} to {high}, where white is unknown: convert it to 16 bits"
        )
    return 7 if signed else 8 if image.format is not None or high > 255 else 0


def _from_float(values: np.ndarray[Any, Any], *, in_file: bool) -> np.ndarray[Any, Any]:
    """Convert numbers from 0 to 1, or 0 to 255 as Pillow's own conversion to mode F gives, to uint8."""
    low, high = float(values.min()), float(values.max())
    white = 255 if high > 1 and not in_file else 1
    if not (np.isfinite(values).all() and (white == 255 or (low >= -1 and high <= 2))):
        raise UnknownWhiteError(f"its grey is in floating point from {low:g} to {high:g}, expected 0 to 1: scale it")
    return np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8)
