"""Shards that are missing or empty at the start: whether they may be, and how they are named."""

from __future__ import annotations

import math

from data.bad_samples import BadSample
from data.config import DataConfig, ReadingConfig
from data.manifest import Counts
from data.sources import Source, expand
from data.store import ShardStore
from ldm.errors import DataError
from ldm.files.messages import SHOWN

WHOLE_SHARD = "*"  # in place of a sample's key


def find_shards(config: DataConfig) -> list[list[Source]]:
    """List the shards of each set, in order, with those that are absent. Raises the errors of expand and Counts."""
    counts = Counts(config.manifest)
    return [
        expand(patterns, allow_pipe=config.allow_pipe, counted=counts.matching, gaps=True)
        for patterns in config.patterns
    ]


def lost_shards(store: ShardStore, config: ReadingConfig, *, section: str, say: bool) -> list[BadSample]:
    """List, and with `say` print, the shards that are missing, with the number of their samples, and the empty ones.

    section: of the configuration. Raises DataError if more are missing than config.max_missing_shards allows, or if no
    shard holds a sample.
    """
    absent, total = sorted(store.absent), len(store.sources)
    missing = [
        BadSample(store.sources[number].shown, WHOLE_SHARD, f"it is missing, with {_number(store.sizes[number])}")
        for number in absent
    ]
    if len(absent) > config.max_missing_shards * total:
        named = [f"{store.sources[number].shown} with {_number(store.sizes[number])}" for number in absent[:SHOWN]]
        listed = "; ".join(named + ["..."] * (len(absent) > SHOWN))
        setting, enough = f"{section}.max_missing_shards", math.ceil(100 * len(absent) / total) / 100
        counted = all(store.sources[number].absent == "counted" for number in absent)
        raise DataError(
            f"{len(absent)} of {total} shards are missing ({listed}), more than {setting} "
            f"({config.max_missing_shards:g}) allows: restore them, "
            f"{'write the manifest again if they are gone for good, ' * counted}or set {setting}={enough:g}"
        )
    if not any(store.sizes[number] for number in range(total) if number not in absent):
        raise DataError(f"none of the shards of {section}.shards holds a sample: give others")
    empty = [BadSample(store.sources[number].shown, WHOLE_SHARD, f"it {why}") for number, why in store.empty.items()]
    for lost in missing + empty if say else ():
        print(f"left out: shard {lost.shard}: {lost.reason}", flush=True)
    return missing + empty


def _number(samples: int) -> str:
    return f"{samples:,} samples" if samples else "an unknown number of samples"
