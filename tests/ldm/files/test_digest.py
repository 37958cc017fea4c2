"""SHA-256 of files, against hashlib."""

import hashlib
from pathlib import Path

from ldm.files.digest import sha256_of, short_hash


def test_digests(tmp_path: Path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"one" * 2**21)
    second.write_bytes(b"two")
    assert sha256_of(first) == hashlib.sha256(first.read_bytes()).hexdigest()
    both = hashlib.sha256(first.read_bytes() + second.read_bytes()).hexdigest()
    assert short_hash([first, second]) == both[:10]
