"""Random draws of data/: computed from keys, not from a generator whose state could be lost."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b


def keyed_hash(*key: object) -> int:
    """Hash a key to a 64-bit number that is the same on any machine, library version and process."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big")


@lru_cache(maxsize=2048)  # at least one per lane and set; at 10,000 samples each, they take 80 MB
def permutation(size: int, *key: object) -> Sequence[int]:
    """Permute range(size) by sorting keyed hashes: stable across versions of every library."""
    return array("I", sorted(range(size), key=lambda index: keyed_hash(*key, index)))
