"""Shards damaged at random, and what must hold of each: the suite checks some, a benchmark thousands."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
from contextlib import redirect_stdout
from pathlib import Path

from PIL import Image

from data.config import DataConfig
from data.loader import Batch, CaptionedImages
from data.manifest import NAME, entry_of, manifest_text
from helpers.accounts import accounts_of

BLOCK = 512
SOUND = 3  # samples of the shard beside the damaged one
Drawn = random.Random
Members = list[tuple[tarfile.TarInfo, bytes]]


def picture(draw: Drawn) -> bytes:
    buffer = io.BytesIO()
    image = Image.frombytes("RGB", (8, 8), draw.randbytes(192))
    image.save(buffer, draw.choice(("PNG", "JPEG", "WEBP")))
    return buffer.getvalue()


def members(draw: Drawn, samples: int) -> Members:
    found: Members = []
    for number in range(samples):
        key = f"{number:09d}"
        content = {
            draw.choice(("png", "jpg", "webp")): picture(draw),
            "txt": f"caption {number}".encode(),
            "json": json.dumps({"caption": f"caption {number}", "key": key}).encode(),
        }
        for extension, data in content.items():
            found.append((tarfile.TarInfo(f"{key}.{extension}"), data))
    return found


def packed(of: Members, draw: Drawn) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=draw.choice((tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT))) as tar:
        for info, data in of:
            info.size = len(data) if info.isfile() else 0
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def edited(draw: Drawn, of: Members) -> Members:
    """Members as nobody should pack them."""
    of = list(of)
    place = draw.randrange(len(of))
    info, data = of[place]
    kind = draw.choice(
        ("remove", "parent", "absolute", "link", "device", "twice", "pickle", "half", "empty", "caption")
    )
    if kind in ("remove", "half"):
        del of[place : place + (1 if kind == "half" else 3)]
    elif kind == "twice":
        of.insert(place, (tarfile.TarInfo(info.name), data))
    elif kind == "pickle":
        of.append((tarfile.TarInfo(info.name.partition(".")[0] + ".pkl"), b"cposix\nsystem\n(S'touch pwned'\ntR."))
    elif kind in ("empty", "caption"):
        of[place] = (info, b"" if kind == "empty" else draw.randbytes(30))
    else:
        changed = tarfile.TarInfo({"parent": "../../", "absolute": "/tmp/"}.get(kind, "") + info.name)
        if kind in ("link", "device"):
            changed.type = draw.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)) if kind == "link" else tarfile.CHRTYPE
            changed.linkname = "/etc/passwd"
        of[place] = (changed, data)
    return of


def damaged(draw: Drawn, content: bytes) -> tuple[bytes, int]:
    """Bytes as disks and networks leave them; and how many samples that can cost, each hit within a block one."""
    data, cost = bytearray(content), 0
    for _ in range(draw.choice((1, 1, 1, 3, 10))):
        blocks, kind = (
            max(len(data) // BLOCK, 1),
            draw.choice(("flip", "cut", "zero", "zeros", "header", "swap", "lose", "random")),
        )
        block, other = draw.randrange(blocks) * BLOCK, draw.randrange(blocks) * BLOCK
        cost += 1 if kind in ("flip", "zero", "random") else len(content)
        if kind == "flip":
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del data[draw.choice((block, draw.randrange(len(data)))) :]
        elif kind == "zero":
            data[block : block + BLOCK] = bytes(len(data[block : block + BLOCK]))
        elif kind == "zeros":
            data[block : block + 7 * BLOCK] = bytes(len(data[block : block + 7 * BLOCK]))
        elif kind == "header":
            _edit_header(draw, data)
        elif kind == "swap":
            one, two = slice(block, block + BLOCK), slice(other, other + BLOCK)
            data[one], data[two] = data[two], data[one]
        elif kind == "lose":
            del data[block : block + draw.choice((1, 100, BLOCK, 3 * BLOCK))]
        else:
            data[block : block + BLOCK] = draw.randbytes(len(data[block : block + BLOCK]))
        if not data:
            break
    return bytes(data), cost


def _edit_header(draw: Drawn, data: bytearray) -> None:
    """One field of a header, its checksum made right again: what no checksum shows."""
    places = [at for at in range(0, len(data) - BLOCK, BLOCK) if data[at + 257 : at + 262] == b"ustar"]
    if not places:
        return
    at = draw.choice(places)
    start, length = draw.choice(((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155)))
    value = draw.choice(
        (b"%0*o" % (length - 1, 8 ** draw.randrange(1, 11) - 1), b"\xff" * length, draw.randbytes(length))
    )
    kinds = (b"1", b"2", b"3", b"5", b"6", b"7", b"g", b"x", b"L", b"K", b"S", b"Z")
    value = draw.choice(kinds) if length == 1 else value
    data[at + start : at + start + length] = value[:length].ljust(length, b"\0")
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + BLOCK])


def check_shard(seed: int, folder: Path) -> str:
    """What became of the shard of that seed, beside a sound one; raises AssertionError where it does not hold."""
    draw = Drawn(seed)
    samples, suffix = draw.randint(1, 24), draw.choice((".tar", ".tar", ".tar.gz"))
    path, other, sound = folder / f"x{suffix}", folder / "y.tar", members(draw, samples)
    path.write_bytes(_zipped(packed(sound, draw), suffix))
    other.write_bytes(packed(members(draw, SOUND), draw))
    (folder / NAME).write_text(manifest_text({one.name: entry_of(one) for one in (path, other)}))
    if draw.random() < 0.3:
        content, cost = _zipped(packed(edited(draw, sound), draw), suffix), 2
    else:
        content, cost = damaged(draw, path.read_bytes())
    path.write_bytes(content)
    before = _listing(folder)
    images, batches = _epoch((path, other), samples + SOUND, seed, prefetch=draw.choice((0, 0, 0, 2)))
    assert _listing(folder) == before, "reading has written something"
    account, beside = sorted(accounts_of(images, batches).closed, key=lambda account: account.shard)
    assert account.delivered + account.rejected == account.expected == samples, "a sample is not accounted for"
    assert (beside.delivered, beside.rejected) == (SOUND, 0), "a sample of the sound shard is lost"
    assert account.rejected == len(images.bad_samples), "a rejected sample is not listed"
    shown = {sample: key for batch in batches for sample, key in zip(batch.samples, batch.keys, strict=True)}
    assert len(set(shown.values())) == len(shown) == account.delivered + SOUND, "the delivered are not different"
    assert account.rejected <= cost or suffix != ".tar", f"{account.rejected} are lost, where {cost} can be"
    return (
        "some rejected" if 0 < account.rejected < samples else "all rejected" if account.rejected else "all delivered"
    )


def _epoch(paths: tuple[Path, ...], visits: int, seed: int, prefetch: int) -> tuple[CaptionedImages, list[Batch]]:
    shards = tuple(str(path) for path in paths)
    config = DataConfig(shards=shards, image_size=8, batch_size=1, prefetch=prefetch, max_bad_fraction=1.0)
    with redirect_stdout(io.StringIO()):  # what is told of damage
        images = CaptionedImages(config, seed=seed, on_bad=lambda bad: None)
        stream = images.stream()
        batches = [next(stream) for _ in range(visits)]
        stream.close()
    return images, batches


def _zipped(content: bytes, suffix: str) -> bytes:
    return gzip.compress(content, compresslevel=1) if suffix.endswith("gz") else content


def _listing(folder: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.stat().st_size) for path in folder.rglob("*"))
