"""Write shards in img2dataset's layout; the same samples always give the same bytes."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.manifest import NAME as MANIFEST
from data.manifest import SIZES, entry_of, manifest_text
from ldm.files.atomic import write_atomically
from ldm.files.strict_json import write_json

KEY_DIGITS_IN_SHARD = 4  # img2dataset's sample names: shard number, then four digits


def write_shards(samples: Sequence[tuple[bytes, str, dict[str, Any]]], folder: Path, *, shards: int) -> None:
    """Deal samples (lossless WebP bytes, best caption, record) to `shards` tars of nearly equal size.

    Writes 00000.tar.gz, 00000_stats.json, ..., sizes.json and manifest.json, each file atomically. The tars are
    compressed, because a tar adds 3 kB of headers and padding per sample, more than a small image itself. Raises
    ValueError if a shard would be empty, or have more samples than its keys can number.
    """
    if not 1 <= shards <= len(samples):
        raise ValueError(f"{len(samples)} samples cannot fill {shards} shards: use fewer shards")
    per_shard = -(-len(samples) // shards)
    if per_shard > 10**KEY_DIGITS_IN_SHARD:
        raise ValueError(f"{per_shard} samples per shard are more than {10**KEY_DIGITS_IN_SHARD}: use more shards")
    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, int] = {}
    for number in range(shards):
        own = samples[number::shards]
        _write_tar(own, folder / f"{number:05d}.tar.gz", number)
        counts = {"count": len(own), "failed_to_download": 0, "failed_to_resize": 0}
        more = {"status_dict": {"success": len(own)}, "successes": len(own)}
        write_json(counts | more, folder / f"{number:05d}_stats.json", indent=1)
        sizes[f"{number:05d}.tar.gz"] = len(own)
    write_json(sizes, folder / SIZES, indent=1)
    entries = {name: entry_of(folder / name) for name in sizes}
    write_atomically(folder / MANIFEST, manifest_text(entries).encode())


def _write_tar(samples: Sequence[tuple[bytes, str, dict[str, Any]]], path: Path, number: int) -> None:
    from webdataset.writer import TarWriter

    # With a fixed owner and time in the tar and gzip headers, the bytes depend on the samples alone.
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, user="nobody", group="nobody", mtime=0) as tar:
        for index, (image, caption, record) in enumerate(samples):
            key = f"{number:05d}{index:0{KEY_DIGITS_IN_SHARD}d}"
            record = record | {"key": key, "status": "success"}
            text = json.dumps(record, ensure_ascii=False, sort_keys=True)
            tar.write({"__key__": key, "webp": image, "txt": caption.encode(), "json": text.encode()})
    write_atomically(path, gzip.compress(buffer.getvalue(), compresslevel=9, mtime=0))


if __name__ == "__main__":
    print(
        "error: data.write is no command: docs/training.md packs a folder of pictures into shards, and "
        "python -m data.manifest FOLDER writes what they hold",
        file=sys.stderr,
    )
    sys.exit(2)
