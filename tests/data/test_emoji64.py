"""The embedded image set as it is committed, and its builder on a small tree of packages."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import data.build_emoji64
from data.build_emoji64 import (
    PACKAGES,
    STYLES,
    TONES,
    Emoji,
    build,
    captions,
    check_packages,
    choose_unseen,
    choose_val,
    main,
    phrase,
    read_emoji,
)
from data.captions import read_captions
from data.manifest import entries_for, entry_of, manifest_text
from data.shards import RawSample, Shard
from data.sources import expand

FOLDER = Path(data.build_emoji64.__file__).parent / "emoji64"
COUNTS = {"train": 6793, "val": 379, "unseen": 400}
TONE_IN_LABEL = re.compile(r"(?:medium-)?(?:light|medium|dark) skin tone(?:, )?")


@dataclass(frozen=True)
class Sample:
    split: str
    caption: str
    image: bytes
    record: dict[str, Any]

    @property
    def pair(self) -> tuple[str, str]:
        return self.record["code"], self.record["style"]

    @property
    def base(self) -> str:
        """The label without its skin tones, which is the same for all sisters."""
        return TONE_IN_LABEL.sub("", self.record["label"]).rstrip(": ,")

    @property
    def tones(self) -> tuple[str, ...]:
        return tuple(self.record["tones"])


@pytest.fixture(scope="module")
def committed() -> list[Sample]:
    found: list[Sample] = []
    for split in COUNTS:
        for source in expand(str(FOLDER / split / "*.tar.gz")):
            shard = Shard(Path(source.location))
            for index in range(len(shard)):
                members = shard[index].members
                found.append(Sample(split, members["txt"].decode(), members["webp"], json.loads(members["json"])))
    return found


def of(committed: list[Sample], split: str) -> list[Sample]:
    return [sample for sample in committed if sample.split == split]


def test_counts_and_size(committed: list[Sample]):
    assert {split: len(of(committed, split)) for split in COUNTS} == COUNTS
    for split, count in COUNTS.items():
        assert sum(json.loads((FOLDER / split / "sizes.json").read_text()).values()) == count
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 30e6


def test_the_manifests_are_those_of_the_shards():
    """As the builder writes them, and read without opening one shard."""
    for split, count in COUNTS.items():
        sources = expand(str(FOLDER / split / "*.tar.gz"))
        entries = {source.name: entry_of(Path(source.location)) for source in sources}
        assert (FOLDER / split / "manifest.json").read_text() == manifest_text(entries)
        assert sum(entry.count for entry in entries_for(sources) if entry) == count


def test_every_caption_is_kept_as_it_is(committed: list[Sample]):
    """What the shipped model was trained on: nothing that captions are cleaned of stands in these."""
    for sample in committed:
        members = {"txt": sample.caption.encode(), "json": json.dumps(sample.record).encode()}
        assert read_captions(RawSample("s", "k", members)) == sample.record["captions"]


def test_every_picture_is_64_x_64_rgb(committed: list[Sample]):
    for sample in committed:
        with Image.open(io.BytesIO(sample.image)) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (64, 64)), sample.record


def test_every_picture_shows_something(committed: list[Sample]):
    """A missing or transparent picture would be all white; the palest emoji is a white square."""
    for sample in committed:
        with Image.open(io.BytesIO(sample.image)) as image:
            assert max(high - low for low, high in image.getextrema()) > 20, sample.record  # pyright: ignore[reportGeneralTypeIssues]


def test_every_record_has_captions_with_its_style(committed: list[Sample]):
    for sample in committed:
        record = sample.record
        texts = record["captions"]
        assert record["style"] in STYLES
        assert f" {record['style']} " in texts[0] and record["label"].split(":")[0] in texts[0]
        assert sample.caption == record["caption"] == texts[0]
        assert len(texts) >= 3 and len(set(texts)) == len(texts), record
        assert all(text == text.strip() and text for text in texts)


def test_splits_are_disjoint(committed: list[Sample]):
    pairs = [sample.pair for sample in committed]
    assert len(set(pairs)) == len(pairs) == 2 * len({code for code, _ in pairs})  # each emoji once in either style
    held_out_whole = {sample.pair[0] for sample in of(committed, "unseen")}
    assert not held_out_whole & {s.pair[0] for split in ("train", "val") for s in of(committed, split)}


def test_val_is_a_twentieth_whose_other_style_is_in_train(committed: list[Sample]):
    train = {sample.pair for sample in of(committed, "train")}
    other = dict(zip(STYLES, reversed(STYLES), strict=True))
    assert len(of(committed, "val")) == round(0.05 * len(committed))
    for code, style in (sample.pair for sample in of(committed, "val")):
        assert (code, other[style]) in train


def test_unseen_are_200_combinations_of_what_train_shows_apart(committed: list[Sample]):
    """In both styles; the emoji stands in train in another tone, the tone on other emoji."""
    unseen, train = of(committed, "unseen"), of(committed, "train")
    assert sorted({sample.pair for sample in unseen}) == sorted(
        (code, style) for code in {sample.pair[0] for sample in unseen} for style in STYLES
    )
    assert len({sample.pair[0] for sample in unseen}) == 200
    tones_of: dict[str, set[tuple[str, ...]]] = {}
    bases_of: dict[tuple[str, ...], set[str]] = {}
    for sample in train:
        tones_of.setdefault(sample.base, set()).add(sample.tones)
        bases_of.setdefault(sample.tones, set()).add(sample.base)
    for sample in unseen:
        assert sample.tones
        assert tones_of[sample.base] - {sample.tones, ()}, sample.record
        assert bases_of[sample.tones] - {sample.base}, sample.record


def test_tones_are_those_of_the_label(committed: list[Sample]):
    for sample in committed:
        in_label = re.findall(r"((?:medium-)?(?:light|medium|dark)) skin tone", sample.record["label"])
        if sample.base:  # the five swatches are tones themselves, not emoji in a tone
            assert set(in_label) == set(sample.tones), sample.record


def test_the_builder_would_choose_the_same_again(committed: list[Sample]):
    """From the codes and tones alone, so that this needs none of the packages."""
    number_of = {name: number for number, name in TONES.items()}
    everything = {
        sample.pair[0]: Emoji(
            code=sample.pair[0],
            base=sample.base,
            label=sample.record["label"],
            tags=(),
            tones=tuple(number_of[tone] for tone in sample.tones),
            image="",
        )
        for sample in committed
    }
    unseen = choose_unseen(list(everything.values()))
    assert unseen == {sample.pair[0] for sample in of(committed, "unseen")}
    assert choose_val(list(everything.values()), unseen) == {sample.pair for sample in of(committed, "val")}


def test_the_styles_are_drawn_differently_for_the_same_words(committed: list[Sample]):
    by_code: dict[str, set[bytes]] = {}
    for sample in of(committed, "unseen"):
        by_code.setdefault(sample.pair[0], set()).add(sample.image)
    assert all(len(pictures) == 2 for pictures in by_code.values())


# --- the builder ---


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("red apple", "red apple"),
        ("flag: Fiji", "flag of Fiji"),
        ("keycap: 5", "keycap 5"),
        ("Santa Claus: light skin tone", "Santa Claus, light skin tone"),
        ("person: dark skin tone, red hair", "person, dark skin tone, red hair"),
    ],
)
def test_phrase(label: str, expected: str):
    assert phrase(label) == expected


def emoji(label: str, tags: tuple[str, ...] = (), tones: tuple[int, ...] = (), base: str = "1F34E") -> Emoji:
    return Emoji(code="1F34E", base=base, label=label, tags=tags, tones=tones, image="1f34e.png")


def person(base: str, tone: int) -> Emoji:
    return Emoji(code=f"{base}-{tone}", base=base, label=base, tags=(), tones=(tone,), image="x.png")


def test_captions_by_example():
    texts = captions(emoji("red apple", ("apple", "fruit", "health", "red")), "noto")
    assert texts[0] == "a noto emoji of red apple"
    assert texts[1] == "red apple"
    assert sorted(texts[2].split(", ")) == [
        "fruit",
        "health",
        "noto emoji",
        "red apple",
    ]  # no tag that the label says
    assert texts[2].startswith("noto emoji, red apple, ")
    assert texts[3] == "red apple, noto"
    assert captions(emoji("flag: Fiji"), "twemoji") == [
        "a twemoji emoji of flag of Fiji",
        "flag: Fiji",
        "twemoji emoji, flag of Fiji",
        "flag of Fiji, twemoji",
    ]


def test_each_tag_is_said_once_and_the_styles_say_others():
    tags = tuple(f"tag{number}" for number in range(8))
    third, fourth = captions(emoji("apple", tags), "noto")[2:]
    said = third.split(", ")[2:] + fourth.split(", ")[1:-1]
    assert len(said) == len(set(said)) == 5 and set(said) <= set(tags)
    assert captions(emoji("apple", tags), "twemoji")[2].split(", ")[2:] != third.split(", ")[2:]


@pytest.mark.parametrize(("bases", "tones"), [("ABCDEF", (1, 2)), ("AB", (1, 2, 3, 4, 5))])
def test_unseen_keeps_a_sister_and_a_bearer(bases: str, tones: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """Even if more are asked for than can be spared."""
    people = [person(base, tone) for base in bases for tone in tones] + [person("Z", 1)]
    monkeypatch.setattr("data.build_emoji64.UNSEEN", 100)
    chosen = choose_unseen([*people, emoji("apple")])
    kept = [one for one in people if one.code not in chosen]
    assert {one.base for one in kept} == {*bases, "Z"}
    assert {one.tones for one in kept} == {(tone,) for tone in tones}
    assert len(chosen) >= 4 and not chosen & {"Z-1", "1F34E"}  # Z has no sister, the apple no tone


def test_val_never_takes_both_styles():
    many = [
        Emoji(code=str(number), base=str(number), label="x", tags=(), tones=(), image="x.png") for number in range(100)
    ]
    chosen = choose_val(many, unseen={"3", "4"})
    assert len(chosen) == 10 and len({code for code, _ in chosen} - {"3", "4"}) == 10
    assert {style for _, style in chosen} == set(STYLES)


@pytest.fixture
def packages(tmp_path: Path, image_bytes: Callable[..., bytes]) -> Path:
    """Twelve plain emoji and two people in five tones each, in the three packages' own layout."""
    root = tmp_path / "packages"
    plain = [(f"1F34{digit:X}", f"fruit {digit}") for digit in range(12)]
    people = [("1F385", "Santa Claus"), ("1F44B-FE0F", "waving hand")]
    labels: list[dict[str, Any]] = [
        {"hexcode": code, "label": label, "tags": ["fruit", "x", "sweet"]} for code, label in plain
    ]
    for code, label in people:
        skins = [
            {
                "hexcode": f"{code.split('-')[0]}-1F3F{tone + 10:X}",
                "label": f"{label}: {name} skin tone",
                "tone": tone,
            }
            for tone, name in TONES.items()
        ]
        labels.append({"hexcode": code.removesuffix("-FE0F"), "label": label, "tags": ["person"], "skins": skins})
    (root / "emojibase-data/en").mkdir(parents=True)
    (root / "emojibase-data/en/data.json").write_text(json.dumps(labels))
    for number, source in enumerate(STYLES.values()):
        folder = root / f"emoji-datasource-{source}"
        (folder / f"img/{source}/64").mkdir(parents=True)

        def entry(code: str, number: int = number, source: str = source, folder: Path = folder) -> dict[str, Any]:
            colour = (sum(code.encode()) % 256, 40 + 100 * number, 90, 200)
            file = folder / f"img/{source}/64/{code.lower()}.png"
            file.write_bytes(image_bytes(colour, mode="RGBA", size=(64, 64)))
            return {"unified": code, "image": file.name, f"has_img_{source}": True}

        entries = [entry(code) for code, _ in plain]
        for code, _ in people:
            tones = [f"{code.split('-')[0]}-1F3F{tone + 10:X}" for tone in TONES]
            entries.append(entry(code) | {"skin_variations": {tone: entry(tone) for tone in tones}})
        entries.append({"unified": "1F999", "image": "1f999.png", f"has_img_{source}": source == "google"})
        (folder / "emoji.json").write_text(json.dumps(entries))
    for name, version in PACKAGES.items():
        (root / name / "package.json").write_text(json.dumps({"name": name, "version": version}))
    return root


def test_emoji_are_those_that_both_packages_draw(packages: Path):
    found = {one.code: one for one in read_emoji(packages)}
    assert len(found) == 12 + 2 * 6 and "1F999" not in found
    waving = found["1F44B-1F3FC"]
    assert (waving.label, waving.base, waving.tones) == ("waving hand: medium-light skin tone", "1F44B", (2,))
    assert (waving.tags, waving.image) == (("person",), "1f44b-1f3fc.png")
    assert found["1F44B-FE0F"].label == "waving hand"  # emojibase writes its code without the variation selector
    assert found["1F340"].tags == ("fruit", "sweet")  # letters are no tags


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_builds_give_the_same_bytes(packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("data.build_emoji64.UNSEEN", 3)
    assert build(packages, tmp_path / "a") == {"train": 40, "val": 2, "unseen": 6}
    build(packages, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(files(tmp_path / "a")) == (8 + 1 + 1) * 2 + 3 * 2
    shard = Shard(tmp_path / "a/unseen/00000.tar.gz")
    assert len(shard) == 6
    members = shard[0].members
    record = json.loads(members["json"])
    with Image.open(io.BytesIO(members["webp"])) as image:  # lossless, over white
        number = list(STYLES).index(record["style"])
        colour = (sum(record["code"].encode()) % 256, 40 + 100 * number, 90)
        expected = tuple(round(255 + (value - 255) * 200 / 255) for value in colour)
        assert image.convert("RGB").getpixel((9, 9)) == pytest.approx(expected, abs=1)
    source = STYLES[record["style"]]
    assert record["url"] == f"npm:emoji-datasource-{source}@16.0.0/img/{source}/64/{record['code'].lower()}.png"
    assert (record["width"], record["height"], record["caption"]) == (64, 64, members["txt"].decode())


@pytest.mark.parametrize("name", list(PACKAGES))
def test_a_wrong_package_is_named_with_the_command_that_mends_it(packages: Path, name: str):
    check_packages(packages)
    (packages / name / "package.json").write_text('{"version": "1.2.3"}')
    with pytest.raises(ValueError, match=f"1.2.3.*npm pack {name}@{PACKAGES[name]}"):
        check_packages(packages)
    (packages / name / "package.json").unlink()
    with pytest.raises(ValueError, match=f"nothing.*npm pack {name}@{PACKAGES[name]}"):
        check_packages(packages)


def test_the_command(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("data.build_emoji64.UNSEEN", 3)
    monkeypatch.setattr("sys.argv", ["emoji64", "--packages", str(packages), "--out", str(tmp_path / "out")])
    assert main() == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train", "unseen", "val"]
    (packages / "emojibase-data/package.json").unlink()
    capsys.readouterr()
    assert main() == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and not captured.out
