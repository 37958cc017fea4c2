"""Describe what was given in place of a shard, and what to do about it."""

from __future__ import annotations

import stat
from pathlib import Path

from ldm.files.messages import one_line
from ldm.files.paths import contents

COPY_AGAIN = "copy it again"
PACK = 'pack pictures and captions into .tar files (docs/training.md, "Your own pictures", or img2dataset)'
LIST = "img2dataset downloads what such a list names, also file:// URLs, and packs it into .tar files"
SUFFIXES = ("*.tar", "*.tar.gz", "*.tgz")

# First bytes of files that are taken for shards: what they are, and what to do.
_BEGINNINGS = (
    (b"\x89PNG", "a PNG picture", PACK),
    (b"\xff\xd8\xff", "a JPEG picture", PACK),
    (b"GIF8", "a GIF picture", PACK),
    (b"BM", "a BMP picture", PACK),
    (b"II*\0", "a TIFF picture", PACK),
    (b"MM\0*", "a TIFF picture", PACK),
    (b"PAR1", "a Parquet file", LIST),
    (b"PK\x03\x04", "a zip archive", "unpack it, and " + PACK),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it, and " + PACK),
    (b"Rar!", "a RAR archive", "unpack it, and " + PACK),
    (b"\xfd7zXZ\0", "compressed by xz", "unpack it (xz -d), or compress it with gzip instead"),
    (b"BZh", "compressed by bzip2", "unpack it (bzip2 -d), or compress it with gzip instead"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it (zstd -d), or compress it with gzip instead"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself with git lfs pull"),
)
_LISTS = (".csv", ".tsv", ".json", ".jsonl")


def described(path: Path, problem: str) -> tuple[str, str]:
    """Say what a file is of which nothing can be read as a tar, and what to do.

    problem: what the reader of tars says. A file that may be a damaged tar, or a page in place of one, has to be copied
    again.
    """
    with path.open("rb") as file:
        start = file.read(512)
    if start[257:262] == b"ustar":
        return problem, COPY_AGAIN
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "it is a WebP picture", PACK
    for beginning, what, remedy in _BEGINNINGS:
        if start.startswith(beginning):
            return f"it is {what}" if what.startswith("a ") else f"it is {what}, not gzip", remedy
    if start.lstrip()[:1] == b"<":
        return "it is a web page or another text in tags", COPY_AGAIN
    if not _is_text(start):
        return problem, COPY_AGAIN
    return ("it is a list", LIST) if path.suffix.lower() in _LISTS else ("it is a text", PACK)


def unreadable(path: Path, error: OSError) -> str:
    """Say why a path cannot be opened as a shard, and what to do."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return f"cannot be read ({one_line(error.strerror or str(error))}: {path}): {COPY_AGAIN}"
    if stat.S_ISDIR(mode):
        return in_place_of_a_folder(path)
    if not stat.S_ISREG(mode):
        return "cannot be read (not a plain file): give the path of a .tar file"
    hint = "allow this user to read it" if isinstance(error, PermissionError) else "check its disk, or " + COPY_AGAIN
    return f"cannot be read ({one_line(error.strerror or str(error))}): {hint}"


def in_place_of_a_folder(folder: Path) -> str:
    """Say what to give in place of a folder."""
    for suffix in SUFFIXES:
        if any(folder.glob(suffix)):
            return f"is a folder: give {folder / suffix}"
    return f"is a folder without .tar files ({contents(folder)}): {PACK}"


def _is_text(start: bytes) -> bool:
    return bool(start) and all(byte >= 32 or byte in b"\t\r\n\f" for byte in start)
