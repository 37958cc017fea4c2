"""Shared fixtures: pictures and tar shards written on the spot, so that no test needs a download."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers.emoji import write_few_emoji
from hypothesis import settings
from PIL import Image

# The suite states what happens on a CPU, in this process and in those that it starts.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# The same examples every time, and no time limit each, so that a busy machine fails nothing.
settings.register_profile("suite", derandomize=True, deadline=None)
settings.load_profile("suite")

Members = Sequence[tuple[str, bytes]]


@pytest.fixture(scope="session")
def image_bytes() -> Callable[..., bytes]:
    """An encoder of single-coloured pictures."""

    def encode(colour: object, *, mode: str = "RGB", size: tuple[int, int] = (8, 8), format: str = "PNG") -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, size, colour).save(buffer, format)  # pyright: ignore[reportArgumentType]
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Members], Path]:
    """Writes (name, content) members to a .tar or .tar.gz."""

    def write(path: Path, members: Members) -> Path:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return path

    return write


@pytest.fixture
def tiny_shards(
    tmp_path: Path, image_bytes: Callable[..., bytes], write_tar: Callable[[Path, Members], Path]
) -> Callable[..., str]:
    """Writes shards of 8 x 8 pictures; returns the glob that names them.

    Sample i of shard s has the colour (10 s, 10 i, 255) and two captions, "s/i" and "s/i again"; its
    picture does not decode if `bad` holds (s, i).
    """

    def write(sizes: Sequence[int], *, bad: Sequence[tuple[int, int]] = (), suffix: str = ".tar") -> str:
        folder = tmp_path / "shards"
        folder.mkdir()
        for shard, size in enumerate(sizes):
            members: list[tuple[str, bytes]] = []
            for index in range(size):
                key, caption = f"{shard:05d}{index:04d}", f"{shard}/{index}"
                picture = b"broken" if (shard, index) in bad else image_bytes((10 * shard, 10 * index, 255))
                record = {"caption": caption, "captions": [caption, f"{caption} again"]}
                members.append((f"{key}.png", picture))
                members.append((f"{key}.txt", caption.encode()))
                members.append((f"{key}.json", json.dumps(record).encode()))
            write_tar(folder / f"{shard:05d}{suffix}", members)
        return str(folder / f"*{suffix}")

    return write


@pytest.fixture(scope="session")
def few_emoji(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two shards with the first 16 of the embedded validation pictures; the glob that names them."""
    return write_few_emoji(tmp_path_factory.mktemp("few_emoji"))
