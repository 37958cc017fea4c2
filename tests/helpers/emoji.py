"""A few of the embedded pictures, for trainings that must not take long."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.forking import ROOT

PICTURES = 16


def write_few_emoji(folder: Path) -> str:
    """Write two shards with the first 16 of the embedded validation pictures into a folder; returns their glob."""
    from data.shards import Shard
    from data.write import write_shards

    (source,) = (ROOT / "data" / "emoji64" / "val").glob("*.tar.gz")
    raw = [Shard(source)[index].members for index in range(PICTURES)]
    samples = [(one["webp"], one["txt"].decode(), json.loads(one["json"])) for one in raw]
    write_shards(samples, folder, shards=2)
    return str(folder / "*.tar.gz")
