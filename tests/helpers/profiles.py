"""ICC profiles, made byte by byte (ICC.1:2010), and the colours that they mean, by formula."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

D50 = (0.9642, 1.0, 0.8249)
# Primaries in XYZ, relative to D50, by column.
ADOBE = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
GAMMA = 563 / 256


def fixed(value: float) -> bytes:
    """s15Fixed16Number."""
    return struct.pack(">i", round(value * 65536))


def xyz(value: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(fixed, value))


def curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def profile(space: bytes, tags: Sequence[tuple[bytes, bytes]], *, kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    usual = [
        (b"desc", b"desc\0\0\0\0" + struct.pack(">I", 2) + b"t\0" + b"\0" * 78), (b"cprt", b"text\0\0\0\0none\0\0\0\0"),
        (b"wtpt", xyz(D50)),
    ]  # fmt: skip
    every = [*usual, *tags]
    table, body, start = struct.pack(">I", len(every)), b"", 132 + 12 * len(every)
    for name, data in every:
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I", start + len(body)) + b"lcms\x02\x40\0\0" + kind + space + pcs
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + b"".join(map(fixed, D50))
    return head.ljust(128, b"\0") + table + body


def matrix_profile(primaries: np.ndarray[Any, Any], gamma: float) -> bytes:
    names = (b"r", b"g", b"b")
    columns = [(name + b"XYZ", xyz(primaries[:, i].tolist())) for i, name in enumerate(names)]
    return profile(b"RGB ", [*columns, *((name + b"TRC", curve(gamma)) for name in names)])


def adobe_rgb() -> bytes:
    return matrix_profile(ADOBE, GAMMA)


def swapped() -> bytes:
    """sRGB with red and green exchanged."""
    from PIL import ImageCms

    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return own.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")


def gamma_grey(gamma: float) -> bytes:
    return profile(b"GRAY", [(b"kTRC", curve(gamma))])


def cmyk() -> bytes:
    """A press whose inks are other colours than the pure ones: an 8-bit table of the 16 corners, in Lab."""
    straight = bytes(range(256))
    corners = b""
    for mix in np.ndindex(2, 2, 2, 2):
        cyan, magenta, yellow, black = mix
        light = max(95 - 35 * cyan - 40 * magenta - 8 * yellow - 70 * black, 5)
        a, b = -30 * cyan + 65 * magenta - 5 * yellow, -40 * cyan + 80 * yellow
        corners += bytes([round(light * 2.55), 128 + a // (1 + 2 * black), 128 + b // (1 + 2 * black)])
    identity = b"".join(map(fixed, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + straight * 4 + corners + straight * 3
    return profile(b"CMYK", [(b"A2B0", table)], kind=b"prtr", pcs=b"Lab ")


def encoded(light: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Linear light from 0 to 1 -> sRGB, uint8 (IEC 61966-2-1)."""
    curved = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * curved).astype(np.uint8)


def from_adobe_rgb(colours: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Adobe RGB -> sRGB, H x W x 3 uint8, clipped: through XYZ."""
    light = np.linalg.solve(SRGB, ADOBE @ ((colours / 255.0) ** GAMMA).reshape(-1, 3).T).T.clip(0, 1)
    return encoded(light).reshape(colours.shape)
