"""What was written is what is read, or it is named what is not."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.checkpoint_damages import DAMAGES, one_bit_flips

from ldm.files.checkpoints import MANIFEST, Digest, fault, seal, sealed

NAMES = ("rank_00000.safetensors", "rank_00001.safetensors", "state.json")
FLIPS = 160


def make_checkpoint(path: Path, *, seed: int = 0) -> Path:
    path.mkdir(parents=True)
    draw = random.Random(seed)
    for size, name in zip((1500, 900, 70), NAMES, strict=True):
        (path / name).write_bytes(draw.randbytes(size))
    seal(path, {name: Digest.of(path / name) for name in NAMES}, name=path.name)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One of step 2, beside one of step 1, both as they were written."""
    make_checkpoint(tmp_path / "checkpoints" / "step_0000001", seed=1)
    return make_checkpoint(tmp_path / "checkpoints" / "step_0000002", seed=2)


def test_nothing_is_wrong_with_what_was_written(checkpoint: Path):
    assert fault(checkpoint) is None
    assert sealed(checkpoint) == {name: Digest.of(checkpoint / name) for name in NAMES}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_damage_is_found(checkpoint: Path, damage: Callable[[Path, random.Random], None]):
    for seed in range(12):
        folder = shutil.copytree(checkpoint.parent, checkpoint.parent.parent / f"copy {seed}" / "checkpoints")
        damage(folder / checkpoint.name, random.Random(seed))
        newest = max(folder.iterdir())
        assert fault(newest) is not None, f"seed {seed}"
        assert fault(folder / "step_0000001") is None


def test_every_flipped_bit_is_found_and_its_file_named(checkpoint: Path):
    draw, named = random.Random(0), set()
    for _ in range(FLIPS):
        before = {path: path.read_bytes() for path in checkpoint.iterdir()}
        one_bit_flips(checkpoint, draw)
        (changed,) = (path for path, content in before.items() if path.read_bytes() != content)
        found = fault(checkpoint)
        assert found is not None and found.startswith(f"{changed.name} "), found
        named.add(changed.name)
        changed.write_bytes(before[changed])
    assert named == {*NAMES, MANIFEST} and fault(checkpoint) is None


def test_every_byte_of_the_manifest_counts(checkpoint: Path):
    """Its spaces and line ends too: whoever touched it may have touched more."""
    path = checkpoint / MANIFEST
    content = path.read_bytes()
    for place in range(len(content)):
        for other in b" \n\t0a":
            if content[place] != other:
                path.write_bytes(content[:place] + bytes([other]) + content[place + 1 :])
                assert fault(checkpoint) is not None, f"{place}: {content[place : place + 1]} became {bytes([other])}"
        path.write_bytes(content[:place])
        assert fault(checkpoint) is not None, f"cut after {place}"


def replaced(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda c: (c / NAMES[0]).unlink(), r"rank_00000.safetensors is missing"),
        (lambda c: (c / "x").touch(), r"x does not belong there"),
        (lambda c: replaced(c / NAMES[1], b"123"), r"rank_00001.safetensors has 3 bytes, expected 900"),
        (lambda c: replaced(c / NAMES[2], bytes(70)), r"state.json has sha256 [0-9a-f]{12}, expected [0-9a-f]{12}"),
        (lambda c: (c / MANIFEST).unlink(), r"manifest.json is missing"),
        (lambda c: replaced(c / MANIFEST, b"{"), r"manifest.json is damaged"),
        (lambda c: replaced(c / MANIFEST, b"[" * 100_000), r"manifest.json is damaged"),
        (lambda c: replaced(c / MANIFEST, b"[]"), r"manifest.json is damaged"),
        (lambda c: replaced(c / MANIFEST, b'{"sha256": 1, "files": {"a": 3}}'), r"manifest.json is damaged"),
        (shutil.rmtree, r"manifest.json is missing"),
    ],
)
def test_the_fault_is_named(checkpoint: Path, damage: Callable[[Path], object], told: str):
    damage(checkpoint)
    assert re.fullmatch(told, fault(checkpoint) or "nothing")
    if MANIFEST in told:
        with pytest.raises(ValueError, match=told):
            sealed(checkpoint)


def test_a_renamed_checkpoint_says_what_it_was(checkpoint: Path):
    assert fault(checkpoint.rename(checkpoint.with_name("step_0000009"))) == "it was written as step_0000002"


@pytest.mark.parametrize("missing", ["name", "files", "sha256"])
def test_a_manifest_that_lacks_a_part_is_damaged_even_if_its_digest_fits(checkpoint: Path, missing: str):
    listed = json.loads((checkpoint / MANIFEST).read_text())
    del listed["sha256"], listed["name" if missing == "sha256" else missing]
    if missing != "sha256":
        listed["sha256"] = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps(listed, indent=1) + "\n")
    assert fault(checkpoint) == "manifest.json is damaged"


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 7])
def test_the_parts_together_read_every_file_and_no_file_twice(
    checkpoint: Path, parts: int, monkeypatch: pytest.MonkeyPatch
):
    read: list[str] = []
    real = Digest.of
    monkeypatch.setattr(Digest, "of", lambda path: (read.append(path.name), real(path))[1])
    assert all(fault(checkpoint, part=part, parts=parts) is None for part in range(parts))
    assert sorted(read) == sorted(NAMES)


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_a_damaged_file_is_found_by_one_part_and_a_missing_one_by_all(checkpoint: Path, parts: int):
    for name in NAMES:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[::-1])
        assert sum(fault(checkpoint, part=part, parts=parts) is not None for part in range(parts)) == 1
        (checkpoint / name).write_bytes(content)
    (checkpoint / NAMES[0]).unlink()
    assert all(fault(checkpoint, part=part, parts=parts) == f"{NAMES[0]} is missing" for part in range(parts))
