"""Build the embedded image set from three npm packages.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 emojibase-data@17.0.0
    for f in *.tgz; do mkdir -p "${f%-*}" && tar xzf "$f" -C "${f%-*}" --strip-components=1; done
    python -m data.build_emoji64 --packages .

The images are Noto Emoji (Google, Apache-2.0) and Twemoji (Twitter and contributors, CC-BY 4.0); the labels and
tags are Unicode CLDR's, through emojibase (MIT). Two builds give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data.order import keyed_hash
from data.pictures import normalized, over_white
from data.write import write_shards

PACKAGES = {"emoji-datasource-google": "16.0.0", "emoji-datasource-twitter": "16.0.0", "emojibase-data": "17.0.0"}
STYLES = {"noto": "google", "twemoji": "twitter"}  # word in captions -> name in packages
UNSEEN = 200  # emoji-and-skin-tone combinations held out in both styles
VAL_FRACTION = 0.05  # of all (emoji, style) pairs, held out in one style only
SHARDS = {"train": 8, "val": 1, "unseen": 1}
TONES = {1: "light", 2: "medium-light", 3: "medium", 4: "medium-dark", 5: "dark"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Emoji:
    """One emoji, with one skin tone or none."""

    code: str  # its code points, "1F385-1F3FB"
    base: str  # code points of the emoji without a skin tone
    label: str  # CLDR's short name: "Santa Claus: light skin tone"
    tags: tuple[str, ...]
    tones: tuple[int, ...]  # 1 (light) to 5 (dark), one per person
    image: str  # file name in the image packages


def read_emoji(packages: Path) -> list[Emoji]:
    """Read all emoji that both image packages contain, with CLDR's label and tags, sorted by code points."""
    labels = _read_labels(packages / "emojibase-data/en/data.json")
    images = [_read_images(packages / f"emoji-datasource-{source}/emoji.json", source) for source in STYLES.values()]
    found: list[Emoji] = []
    for code in sorted(images[0].keys() & images[1].keys()):
        record, base = labels[_plain(code)]
        tone = record.get("tone", ())
        tones = (tone,) if isinstance(tone, int) else tuple(tone)
        tags = tuple(tag for tag in base.get("tags", []) if len(tag) > 1)
        found.append(
            Emoji(code=code, base=base["hexcode"], label=record["label"], tags=tags, tones=tones, image=images[0][code])
        )
    return found


def _plain(code: str) -> str:
    return code.replace("-FE0F", "")  # only some packages write the variation selector


def _read_labels(path: Path) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Map code points to (the emoji's own record, the record of its form without skin tone)."""
    bases = json.loads(path.read_text(encoding="utf-8"))
    return {_plain(record["hexcode"]): (record, base) for base in bases for record in [base, *base.get("skins", [])]}


def _read_images(path: Path, source: str) -> dict[str, str]:
    images: dict[str, str] = {}
    for base in json.loads(path.read_text(encoding="utf-8")):
        for record in [base, *base.get("skin_variations", {}).values()]:
            if record[f"has_img_{source}"]:
                images[record["unified"]] = record["image"]
    return images


def choose_unseen(emoji: list[Emoji]) -> set[str]:
    """Choose UNSEEN toned emoji by hash; for each, another tone of the emoji and another emoji of the tone remain."""
    toned = [one for one in emoji if one.tones]
    variants, with_tones = Counter(one.base for one in toned), Counter(one.tones for one in toned)
    chosen: set[str] = set()
    for one in sorted(toned, key=lambda one: keyed_hash("unseen", one.code)):
        if len(chosen) < UNSEEN and variants[one.base] > 1 and with_tones[one.tones] > 1:
            chosen.add(one.code)
            variants[one.base] -= 1
            with_tones[one.tones] -= 1
    return chosen


def choose_val(emoji: list[Emoji], unseen: set[str]) -> set[tuple[str, str]]:
    """Choose VAL_FRACTION of all (emoji, style) pairs by hash, never both styles of one emoji."""
    wanted = round(VAL_FRACTION * len(emoji) * len(STYLES))
    pairs = [(one.code, style) for one in emoji if one.code not in unseen for style in STYLES]
    chosen: dict[str, str] = {}
    for code, style in sorted(pairs, key=lambda pair: keyed_hash("val", *pair)):
        if len(chosen) < wanted:
            chosen.setdefault(code, style)
    return set(chosen.items())


def phrase(label: str) -> str:
    """Rewrite CLDR's label for a sentence: "flag: Fiji" -> "flag of Fiji"; other colons become commas."""
    head, colon, rest = label.partition(": ")
    if not colon:
        return label
    return {"flag": f"flag of {rest}", "keycap": f"keycap {rest}"}.get(head, f"{head}, {rest}")


def captions(one: Emoji, style: str) -> list[str]:
    """Write captions, best first: a sentence with the style, CLDR's label, and two with tags not in the label."""
    spoken = phrase(one.label)
    words = set(spoken.lower().replace(",", " ").replace(":", " ").split())
    spare = [tag for tag in one.tags if tag.lower() not in words]
    # Choose tags by hash, because they are listed in alphabetical order.
    spare.sort(key=lambda tag: keyed_hash("tags", one.code, style, tag))
    with_tags = ", ".join([f"{style} emoji", spoken, *spare[:3]])
    more_tags = ", ".join([spoken, *spare[3:5], style])
    return list(dict.fromkeys([f"a {style} emoji of {spoken}", one.label, with_tags, more_tags]))


def encode(one: Emoji, style: str, packages: Path) -> tuple[bytes, str, dict[str, Any]]:
    """Encode one sample: the image over white as lossless WebP, its best caption, its record."""
    source = STYLES[style]
    relative = f"img/{source}/64/{one.image}"
    with Image.open(packages / f"emoji-datasource-{source}" / relative) as image:
        picture = over_white(normalized(image))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=75, method=4)  # effort, not loss: 20 times faster than at most
    texts = captions(one, style)
    record = {
        "url": f"npm:emoji-datasource-{source}@{PACKAGES[f'emoji-datasource-{source}']}/{relative}",
        "caption": texts[0],
        "captions": texts,
        "label": one.label,
        "style": style,
        "code": one.code,
        "tones": [TONES[tone] for tone in one.tones],
        "width": picture.width,
        "height": picture.height,
    }
    return buffer.getvalue(), texts[0], record


def build(packages: Path, out: Path) -> dict[str, int]:
    """Write the three splits below `out`; returns the number of images in each."""
    emoji = read_emoji(packages)
    unseen = choose_unseen(emoji)
    val = choose_val(emoji, unseen)
    splits: dict[str, list[tuple[Emoji, str]]] = {"train": [], "val": [], "unseen": []}
    for one in emoji:
        for style in STYLES:
            held_out = "val" if (one.code, style) in val else "train"
            splits["unseen" if one.code in unseen else held_out].append((one, style))
    for name, pairs in splits.items():
        pairs.sort(key=lambda pair: keyed_hash("order", pair[0].code, pair[1]))  # mixes emoji and styles in every shard
        print(f"{name}: encoding {len(pairs)} images", flush=True)
        samples = [encode(one, style, packages) for one, style in pairs]
        write_shards(samples, out / name, shards=SHARDS[name])
    return {name: len(pairs) for name, pairs in splits.items()}


def check_packages(packages: Path) -> None:
    """Raise ValueError, with the command to fix it, unless all packages have the expected versions."""
    for name, version in PACKAGES.items():
        manifest = packages / name / "package.json"
        found = json.loads(manifest.read_text())["version"] if manifest.exists() else "nothing"
        if found != version:
            raise ValueError(
                f"{packages / name} holds {found}, expected {version}: npm pack {name}@{version}, and unpack it there"
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m data.build_emoji64", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--packages", type=Path, required=True, help="folder that holds the three unpacked packages")
    here = Path(__file__).with_name("emoji64")
    parser.add_argument("--out", type=Path, default=here, help="where train/, val/, unseen/ go")
    args = parser.parse_args()
    try:
        check_packages(args.packages)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(build(args.packages, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
