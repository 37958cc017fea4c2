"""Everything that is drawn in data/: from keys, never from a generator whose state could be lost."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b


def keyed_hash(*key: object) -> int:
    """A 64-bit number that depends on the key alone: on no machine, library version or process."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big")


@lru_cache(maxsize=2048)  # one a lane and set and more; of 10,000 samples each, they take 80 MB
def permutation(size: int, *key: object) -> Sequence[int]:
    """A permutation of range(size), drawn by sorting keyed hashes: stable across versions of every library."""
    return array("I", sorted(range(size), key=lambda index: keyed_hash(*key, index)))
