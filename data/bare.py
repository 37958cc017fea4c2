"""Picture files without their metadata, for those of which only the metadata cannot be read.

Only what the pixels need is kept, and the orientation.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

PNG, JPEG, TIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", {b"II*\0": "<", b"MM\0*": ">"}
CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"eXIf")  # PNG, third edition, section 11
PNG_PROFILE, JPEG_PROFILE, TIFF_PROFILE = b"iCCP", b"ICC_PROFILE\0", 34675
# TIFF 6.0, section 8 and on: size, depth, colours, packing, strips and tiles, orientation.
TAGS = {
    *(254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325),
    *(332, 338, 339, 340, 341, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),
}
START_OF_SCAN, APPLICATION, EXIF_SEGMENT, ADOBE, COMMENT = 0xDA, range(0xE0, 0xF0), 0xE1, 0xEE, 0xFE  # JPEG's markers
ADOBE_BYTES = 12  # which tell CMYK from its complement
ENTRY = 12


def bare(data: bytes) -> Iterator[bytes]:
    """Yield a PNG, JPEG or TIFF without metadata but its profile and orientation, and then without its profile.

    Nothing for any other file, and for one whose structure cannot be followed.
    """
    for keep_profile in (True, False):
        try:
            if data.startswith(PNG):
                yield _bare_png(data, keep_profile)
            elif data.startswith(JPEG):
                yield _bare_jpeg(data, keep_profile)
            elif data[:4] in TIFF:
                yield _bare_tiff(data, keep_profile)
        except (struct.error, IndexError):
            return


def _bare_png(data: bytes, keep_profile: bool) -> bytes:
    kept, place = [PNG], len(PNG)
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        name, end = data[place + 4 : place + 8], place + 12 + length
        needed = name in CHUNKS or (keep_profile and name == PNG_PROFILE)
        sound = zlib.crc32(data[place + 4 : end - 4]).to_bytes(4, "big") == data[end - 4 : end]
        if needed and (sound or name[:1].isupper()):  # a critical chunk that is damaged must stay an error
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _bare_jpeg(data: bytes, keep_profile: bool) -> bytes:
    kept, place = [JPEG], len(JPEG)
    while data[place + 1] != START_OF_SCAN:
        mark, marker, length = struct.unpack_from(">BBH", data, place)
        if mark != 0xFF or length < 2:
            raise IndexError
        segment = data[place : place + 2 + length]
        is_exif = marker == EXIF_SEGMENT and segment[4:].startswith(b"Exif\0\0")
        is_profile = keep_profile and segment[4:].startswith(JPEG_PROFILE)
        is_adobe = marker == ADOBE and len(segment) >= 4 + ADOBE_BYTES
        if not (marker in APPLICATION or marker == COMMENT) or is_exif or is_profile or is_adobe:
            kept.append(segment)
        place += 2 + length
    return b"".join([*kept, data[place:]])


def _bare_tiff(data: bytes, keep_profile: bool) -> bytes:
    """Keep the first page's directory alone, in its place."""
    order = TIFF[data[:4]]
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    entries = [data[place : place + ENTRY] for place in range(start + 2, start + 2 + count * ENTRY, ENTRY)]
    wanted = TAGS | ({TIFF_PROFILE} if keep_profile else set[int]())
    kept = [entry for entry in entries if struct.unpack_from(f"{order}H", entry)[0] in wanted]
    directory = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + bytes(4)
    return data[:start] + directory + data[start + len(directory) :]
