"""What may happen to a checkpoint on a disk: each way is done to a copy, at a place drawn at random.

Used by tests/ldm/checkpoints and by benchmarks/reliability_checkpoints.py.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from ldm.files.checkpoints import MANIFEST, Digest

BLOCK = 512  # bytes that a disk writes at once


def some_file(checkpoint: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(checkpoint.iterdir()))


def one_bit_flips(checkpoint: Path, draw: random.Random) -> None:
    path = some_file(checkpoint, draw)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def a_block_is_zero(checkpoint: Path, draw: random.Random) -> None:
    path = some_file(checkpoint, draw)
    content = path.read_bytes()
    start = draw.randrange(0, len(content), BLOCK)
    zeros = bytes(len(content[start : start + BLOCK]))
    assert content[start : start + BLOCK] != zeros, "nothing would be damaged"
    path.write_bytes(content[:start] + zeros + content[start + BLOCK :])


def a_file_is_cut(checkpoint: Path, draw: random.Random) -> None:
    path = some_file(checkpoint, draw)
    size = path.stat().st_size
    os.truncate(path, draw.choice([0, size - 1, draw.randrange(size)]))


def a_file_is_longer(checkpoint: Path, draw: random.Random) -> None:
    with some_file(checkpoint, draw).open("ab") as file:
        file.write(draw.choice([b"\n", b"\0", b" " * BLOCK]))


def a_file_is_missing(checkpoint: Path, draw: random.Random) -> None:
    some_file(checkpoint, draw).unlink()


def a_file_is_stray(checkpoint: Path, draw: random.Random) -> None:
    name = draw.choice(["rank_00002.safetensors", "state.json.partial", ".hidden", "rank_00001.json"])
    (checkpoint / name).write_bytes(draw.randbytes(draw.randrange(100)))


def two_files_are_swapped(checkpoint: Path, draw: random.Random) -> None:
    first, second = draw.sample(sorted(checkpoint.iterdir()), 2)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def a_file_is_of_another_step(checkpoint: Path, draw: random.Random) -> None:
    path = some_file(checkpoint, draw)
    path.write_bytes((checkpoint.with_name("step_0000001") / path.name).read_bytes())


def all_files_are_of_another_step(checkpoint: Path, draw: random.Random) -> None:
    for path in checkpoint.iterdir():
        path.write_bytes((checkpoint.with_name("step_0000001") / path.name).read_bytes())


def a_file_and_its_line_are_changed(checkpoint: Path, draw: random.Random) -> None:
    """By somebody who knows of the manifest, but not that it has a digest of its own."""
    path = draw.choice([path for path in sorted(checkpoint.iterdir()) if path.name != MANIFEST])
    path.write_bytes(path.read_bytes()[::-1])
    listed = json.loads((checkpoint / MANIFEST).read_text())
    listed["files"][path.name] = Digest.of(path)._asdict()
    (checkpoint / MANIFEST).write_text(json.dumps(listed, indent=1) + "\n")


def a_file_and_its_line_are_gone(checkpoint: Path, draw: random.Random) -> None:
    path = draw.choice([path for path in sorted(checkpoint.iterdir()) if path.name != MANIFEST])
    path.unlink()
    listed = json.loads((checkpoint / MANIFEST).read_text())
    del listed["files"][path.name]
    (checkpoint / MANIFEST).write_text(json.dumps(listed, indent=1) + "\n")


def the_folder_is_renamed(checkpoint: Path, draw: random.Random) -> None:
    checkpoint.rename(checkpoint.with_name(f"step_{draw.randrange(3, 100):07d}"))


def a_file_is_a_link(checkpoint: Path, draw: random.Random) -> None:
    """To the same bytes elsewhere, where anybody may change them."""
    path = some_file(checkpoint, draw)
    elsewhere = checkpoint.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def a_file_is_a_folder(checkpoint: Path, draw: random.Random) -> None:
    path = some_file(checkpoint, draw)
    path.unlink()
    path.mkdir()


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    one_bit_flips,
    a_block_is_zero,
    a_file_is_cut,
    a_file_is_longer,
    a_file_is_missing,
    a_file_is_stray,
    two_files_are_swapped,
    a_file_is_of_another_step,
    all_files_are_of_another_step,
    a_file_and_its_line_are_changed,
    a_file_and_its_line_are_gone,
    the_folder_is_renamed,
    a_file_is_a_link,
    a_file_is_a_folder,
)


# `latest` is for people: whatever becomes of it, no checkpoint is the worse for it, nor found any less.
def latest_is_empty(latest: Path) -> None:
    latest.write_text("")


def latest_is_garbage(latest: Path) -> None:
    latest.write_bytes(b"\xff\0step")


def latest_is_missing(latest: Path) -> None:
    latest.unlink()


def latest_points_outside(latest: Path) -> None:
    latest.write_text("../../../etc\n")


def latest_is_a_link_outside(latest: Path) -> None:
    outside = latest.parent.parent / "outside"
    outside.write_text("untouched")
    latest.unlink()
    latest.symlink_to(outside)


def latest_is_a_folder(latest: Path) -> None:
    latest.unlink()
    latest.mkdir()


LATEST_DAMAGES: tuple[Callable[[Path], None], ...] = (
    latest_is_empty,
    latest_is_garbage,
    latest_is_missing,
    latest_points_outside,
    latest_is_a_link_outside,
    latest_is_a_folder,
)
