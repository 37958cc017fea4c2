"""A zoo of odd shards: how each is made, and what every reader of shards makes of it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Rejected:
    """A sample that cannot be used, for a reason that this pattern matches."""

    reason: str


@dataclass(frozen=True)
class Odd:
    """A shard: its file, the settings to read it with, and of each sample its best caption or its rejection.

    refused: what the error says if nothing of it can be read. empty: it counts as a shard with 0 samples.
    """

    content: Callable[[], bytes] | None  # None: a folder
    samples: Mapping[str, str | Rejected] = field(default_factory=dict[str, Any])
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    refused: str = ""
    empty: bool = False
    name: str = "x.tar"


@cache
def jpg(colour: str = "red", format: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, format)
    return out.getvalue()


def packed(*members: tuple[str, bytes | tarfile.TarInfo], format: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = 0 if isinstance(content, tarfile.TarInfo) else len(content)
            tar.addfile(info, io.BytesIO(b"" if isinstance(content, tarfile.TarInfo) else content))
    return out.getvalue()


def special(kind: bytes, name: str, target: str = "") -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return name, info


def one(
    expected: str | Rejected = "a cat",
    *,
    picture: bytes | None = None,
    settings: Mapping[str, Any] | None = None,
    **members: bytes,
) -> Odd:
    """One sample: a picture and these members; underscores in their names are dots."""
    named = [(f"a.{ending.replace('_', '.')}", content) for ending, content in members.items()]
    pictures = [("a.jpg", picture if picture is not None else jpg())]
    return Odd(lambda: packed(*pictures, *named), {"a": expected}, settings or {})


def with_json(
    content: object, expected: str | Rejected = "a cat", txt: bytes | None = b"a cat", settings: Any = None
) -> Odd:
    record = content if isinstance(content, bytes) else json.dumps(content).encode()
    members = {} if txt is None else {"txt": txt}
    return one(expected, settings=settings, json=record, **members)


def file(content: Callable[[], bytes], refused: str, name: str = "x.tar") -> Odd:
    return Odd(content, refused=refused, name=name)


SOUND = (("a.jpg", jpg()), ("a.txt", b"a cat"))
TWO = (*SOUND, ("b.jpg", jpg("blue")), ("b.txt", b"a dog"))
BOTH = {"a": "a cat", "b": "a dog"}
LONG = "folder/" * 20 + "a" * 90


def v7(content: bytes) -> bytes:
    """Headers without the magic of ustar, as the oldest tars have them."""
    old, at = bytearray(content), 0
    while old[at : at + 100].strip(b"\0"):
        size = int(bytes(old[at + 124 : at + 136]).rstrip(b"\0 "), 8)
        old[at + 257 : at + 512] = bytes(255)
        old[at + 148 : at + 156] = b" " * 8
        old[at + 148 : at + 156] = b"%06o\0 " % sum(old[at : at + 512])
        at += 512 + -(-size // 512) * 512
    return bytes(old)


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.jpg", jpg())
    return out.getvalue()


ZOO: dict[str, Odd] = {
    # Captions in a .txt.
    "sound": Odd(lambda: packed(*TWO), BOTH),
    "a byte-order mark": one(txt="\ufeffa cat".encode()),
    "line ends of Windows": one("a cat", txt=b"a cat\r\n"),
    "control characters": one("a cat", txt=b"a\0cat\x1b"),
    "composed letters": one("caf\u00e9", txt="cafe\u0301".encode()),
    "a caption in Latin-1": one(Rejected("its txt does not parse .*utf-8"), txt=b"caf\xe9"),
    "a caption in UTF-16": one(Rejected("its txt does not parse"), txt="a cat".encode("utf-16")),
    "an empty caption": one(Rejected("no caption .*its members are jpg, txt"), txt=b""),
    "blanks as a caption": one(Rejected("no caption"), txt=b" \n\t"),
    "a caption of 70,000 bytes": one(Rejected("a caption has 70,000 bytes"), txt=b"x" * 70_000),
    "a caption of 2 MiB": one(Rejected("its txt has 2,097,152 bytes"), txt=b"x" * 2**21),
    "a caption in Latin-1 beside a sound json": with_json({"caption": "a cat"}, txt=b"caf\xe9"),
    "lines are one caption": one("a cat  a dog", txt=b"a cat\n\na dog\n"),
    "lines are captions if asked": one("a cat", txt=b"\na cat\na dog\n", settings={"caption_lines": "separate"}),
    # A sound .txt beside whatever json.
    "a broken json": with_json(b"{broken"),
    "an empty json": with_json(b""),
    "a json in UTF-16": with_json("{}".encode("utf-16")),
    "a list as json": with_json(["x"]),
    "null as json": with_json(None),
    "a number as caption": with_json({"caption": 7}),
    "an object as caption": with_json({"caption": {"de": "Katze"}}),
    "half a surrogate": with_json(b'{"caption": "a \\ud83d b"}'),
    "1 MiB of EXIF": with_json({"exif": "y" * 2**20, "caption": "a cat"}),
    "a json without end": with_json(b"[" * 100_000),
    "a number of 5,000 digits": with_json(b'{"n": ' + b"9" * 5000 + b"}"),
    "two json": Odd(lambda: packed(*SOUND, ("a.json", b"{}"), ("a.JSON", b"{}")), {"a": "a cat"}),
    "a link as json": Odd(lambda: packed(*SOUND, special(tarfile.SYMTYPE, "a.json", "/etc/passwd")), {"a": "a cat"}),
    # Captions in the json alone.
    "a caption in the json": with_json({"caption": "a cat"}, txt=None),
    "a list of captions": with_json({"captions": ["a cat", 7, None]}, txt=None),
    "nothing but a number": with_json({"caption": 7}, Rejected("not text .json.caption holds a int"), txt=None),
    "nothing but a broken json": with_json(b"{", Rejected("its json does not parse"), txt=None),
    "a json with other keys": with_json(
        {"text": "a cat", "url": "x"}, Rejected("with the keys text, url in its json: data.caption_keys"), txt=None
    ),
    "languages": with_json(
        {"captions": {"en": "a cat", "de": "Katze"}},
        Rejected(r"its json.captions is an object \(de, en: name one in data.caption_keys, as json.captions.en"),
        txt=None,
    ),
    # Names that are asked for.
    "one language": with_json(
        {"captions": {"en": "a cat", "de": ["Katze"]}}, "Katze", None, settings={"caption_keys": ("json.captions.de",)}
    ),
    "a key without its json": with_json({"TEXT": "a cat"}, txt=None, settings={"caption_keys": ("TEXT",)}),
    "a key with a dot": with_json({"alt.text": "a cat"}, txt=None, settings={"caption_keys": ("json.alt.text",)}),
    "keys in a list": with_json(
        {"boxes": [{"text": "a cat"}, {"text": "a dog"}]}, txt=None, settings={"caption_keys": ("boxes.text",)}
    ),
    "another ending": one(cap=b"a cat", settings={"caption_keys": (".cap", "txt")}),
    "the first of two endings": one(txt=b"a dog", caption=b"a cat", settings={"caption_keys": ("caption", "txt")}),
    "the second where the first lacks": one(txt=b"a cat", settings={"caption_keys": ("caption", "txt")}),
    "classes": one("7", cls=b"7", settings={"caption_keys": ("cls",)}),
    "another json": one(meta_json=b'{"text": "a cat"}', settings={"caption_keys": ("meta.json.text",)}),
    "names with dots": Odd(
        lambda: packed(("a.input.jpg", jpg()), ("a.outputs.txt", b"a cat")),
        {"a": "a cat"},
        {"image_keys": ("input.jpg",), "caption_keys": ("outputs.txt",)},
    ),
    "names with dots that nobody named": Odd(
        lambda: packed(("a.input.jpg", jpg()), ("a.outputs.txt", b"a cat")),
        {"a": Rejected("its members are input.jpg, outputs.txt: data.caption_keys names others")},
    ),
    "a picture by another name": Odd(
        lambda: packed(("a.input.jpg", jpg()), ("a.txt", b"a cat")),
        {"a": Rejected(r"no image among its members \(input.jpg, txt: data.image_keys names others\)")},
    ),
    "no caption": one(Rejected("no caption .*its members are jpg: data.caption_keys names others")),
    "no caption, if asked": one("", settings={"missing_caption": "empty"}),
    "an unusable caption is not none": one(
        Rejected("does not parse"), txt=b"\xff", settings={"missing_caption": "empty"}
    ),
    # Pictures and members.
    "a caption alone": Odd(lambda: packed(("a.txt", b"a cat")), {"a": Rejected("no image among its members .txt:")}),
    "a picture of no bytes": one(Rejected("does not decode"), picture=b"", txt=b"a cat"),
    "a web page as picture": one(Rejected("does not decode"), picture=b"<html>404</html>", txt=b"a cat"),
    "half a picture": one(Rejected("does not decode"), picture=jpg()[:-200], txt=b"a cat"),
    "two pictures of one name": Odd(lambda: packed(*SOUND, ("a.JPG", jpg())), {"a": Rejected("its jpg occurs twice")}),
    "two formats": Odd(lambda: packed(*SOUND, ("a.png", jpg("blue", "PNG"))), {"a": "a cat"}),
    "a link as picture": Odd(
        lambda: packed(("a.txt", b"a cat"), special(tarfile.SYMTYPE, "a.jpg", "b.jpg")), {"a": Rejected("is a link")}
    ),
    "a sparse picture": Odd(
        lambda: packed(("a.txt", b"a cat"), special(tarfile.GNUTYPE_SPARSE, "a.jpg")), {"a": Rejected("a sparse file")}
    ),
    "links, pipes and folders alone": Odd(
        lambda: packed(
            special(tarfile.SYMTYPE, "b.jpg", "a.jpg"),
            special(tarfile.FIFOTYPE, "c.jpg"),
            special(tarfile.DIRTYPE, "d.jpg"),
            *SOUND,
        ),
        {"a": "a cat"},
    ),  # fmt: skip
    "folders in names": Odd(lambda: packed(("./v1.2/a.jpg", jpg()), ("./v1.2/a.txt", b"a cat")), {"./v1.2/a": "a cat"}),
    "capital endings": Odd(lambda: packed(("a.JPG", jpg()), ("a.TXT", b"a cat")), {"a": "a cat"}),
    "odd keys": Odd(lambda: packed(("ä [1] {b}.jpg", jpg()), ("ä [1] {b}.txt", b"a cat")), {"ä [1] {b}": "a cat"}),
    "files of macOS, a README": Odd(lambda: packed(("README", b"?"), ("._a", b"?"), *SOUND), {"a": "a cat"}),
    "members apart": Odd(lambda: packed(TWO[0], TWO[2], TWO[1], TWO[3]), BOTH),
    # Tars.
    "long names of pax": Odd(
        lambda: packed((f"{LONG}.jpg", jpg()), (f"{LONG}.txt", b"a cat"), format=tarfile.PAX_FORMAT), {LONG: "a cat"}
    ),
    "long names of GNU": Odd(
        lambda: packed((f"{LONG}.jpg", jpg()), (f"{LONG}.txt", b"a cat"), format=tarfile.GNU_FORMAT), {LONG: "a cat"}
    ),
    "the oldest format": Odd(lambda: v7(packed(*TWO)), BOTH),
    "gzip": Odd(lambda: gzip.compress(packed(*TWO)), BOTH, name="x.tar.gz"),
    "gzip by another name": Odd(lambda: gzip.compress(packed(*TWO)), BOTH),
    "no gzip in spite of the name": Odd(lambda: packed(*TWO), BOTH, name="x.tgz"),
    "two tars in one file": Odd(lambda: packed(*SOUND) + packed(*TWO), {"a": "a cat"}),
    "bytes behind the end": Odd(lambda: packed(*SOUND) + b"x" * 700, {"a": "a cat"}),
    "no bytes": Odd(lambda: b"", empty=True),
    "a tar without members": Odd(lambda: packed(), empty=True),
    "gzip of nothing": Odd(lambda: gzip.compress(b""), empty=True, name="x.tar.gz"),
    "a README alone": Odd(lambda: packed(("README", b"hello")), empty=True),
    # What is no shard, and what to do instead.
    "a cut tar": file(lambda: packed(*TWO)[:2000], "truncated or damaged after 1 samples.*copy it again"),
    "a cut gzip": file(lambda: gzip.compress(packed(*TWO))[:-9], "copy it again", "x.tar.gz"),
    "a folder": Odd(None, refused=r"is a folder without \.tar files \(1 \.png, 1 \.txt\): pack pictures and captions"),
    "a PNG": file(lambda: jpg(format="PNG"), "it is a PNG picture.*: pack pictures and captions into .tar", "x.png"),
    "a JPEG": file(jpg, "it is a JPEG picture.*: pack pictures", "x.jpg"),
    "a WebP": file(lambda: jpg(format="WEBP"), "it is a WebP picture.*: pack pictures", "x.webp"),
    "a CSV": file(lambda: b"url,caption\nx.jpg,a cat\n", "it is a list.*: img2dataset", "x.csv"),
    "a Parquet file": file(lambda: b"PAR1" + bytes(99), "it is a Parquet file.*: img2dataset", "x.parquet"),
    "a README beside the shards": file(lambda: b"# My pictures\n", "it is a text.*: pack", "README.md"),
    "a web page": file(lambda: b"<html>404</html>" * 99, "it is a web page.*: copy it again"),
    "a zip": file(zipped, "it is a zip archive.*: unpack it, and pack", "x.zip"),
    "xz": file(lambda: lzma.compress(packed(*TWO)), r"compressed by xz, not gzip.*: unpack it \(xz -d\)", "x.tar.xz"),
    "bzip2": file(lambda: bz2.compress(packed(*TWO)), "compressed by bzip2, not gzip", "x.tar.bz2"),
    "a pointer of Git LFS": file(lambda: b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
}
