"""No credential and no local path leaves the machine with a model, wherever in its configuration it stood."""

from __future__ import annotations

import pytest
import yaml

from ldm.interop.published import public_name, published, published_card

URL = "https://alice:PASSWORD@host.example:8080/set/{00000..00003}.tar?X-Amz-Signature=SIGNATURE#f"
PIPE = 'pipe:curl -s -H "Authorization: Bearer SECRET" https://host.example/t/{00000..00003}.tar'
HOME = "/home/alice/secret"
NOTES = {
    "run": {"name": "x", "folder": f"{HOME}/runs", "steps": 3, "resume": f"{HOME}/runs/y"},
    "data": {
        "shards": [URL, PIPE, f"{HOME}/00000.tar", "data/emoji64/train/*.tar.gz", "s3://KEY:SECRET@bucket/a.tar"],
        "sets": [{"name": "a", "shards": URL}],
        "manifest": "m/SECRET/manifest.json",
        "cache": f"{HOME}/cache",
    },
    "validation": {"shards": f"{HOME}/val/*.tar", "manifest": "https://t:SECRET@h/m.json?SIGNATURE"},
    "model": {
        "vae": "weights/SECRET/emoji64", "text": "runs/my_clip/", "start": "runs/SECRET/my_dit/model",
        "new": "~/SECRET/a", "denoiser": {"kind": "dit"},
    },
    "preview": {"prompts": ["a red apple", "black/white: a zebra", "https is a word"]},
}  # fmt: skip


def test_what_is_private_is_not_published_and_the_rest_is():
    text = published(yaml.safe_dump(NOTES))
    assert not [word for word in ("PASSWORD", "SIGNATURE", "SECRET", "KEY", "alice", "home") if word in text], text
    found = yaml.safe_load(text)
    assert found["data"]["shards"] == [
        "https://host.example:8080/set/{00000..00003}.tar", "a pipe ({00000..00003}.tar)", "00000.tar", "*.tar.gz",
        "s3://bucket/a.tar",
    ]  # fmt: skip
    assert found["model"] == {
        "vae": "emoji64",
        "text": "my_clip",
        "start": "my_dit",
        "new": "a",
        "denoiser": {"kind": "dit"},
    }
    assert found["preview"] == NOTES["preview"] and found["run"] == {"name": "x", "steps": 3}
    assert published(text) == text


def test_what_holds_nothing_private_is_published_as_it_is_written():
    for text in ("", "run: {name: tiny}\n", "run: {resume: auto}  # a comment\n", "not: [closed\n"):
        assert published(text) == text
    assert yaml.safe_load(published("run: {a: 1}\n", {"license": "mit"})) == {
        "run": {"a": 1},
        "publish": {"license": "mit"},
    }


def test_a_text_that_is_not_parsed_is_searched():
    text = published(f"a: [not closed\nb: {URL}\nc: {PIPE}\n")
    assert text == "a: [not closed\nb: https://host.example:8080/set/{00000..00003}.tar\nc: a pipe\n"


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("weights/emoji64", "emoji64"), ("runs/x/model", "x"), ("model", "model"), ("C:\\Users\\bob\\m", "m"),
        ("/", ""),
        ("~/.cache/huggingface/hub/models--owner--name/snapshots/0123", "owner/name"), ("~", ""),
        ("pipe:cat a.tar b.tgz 'c/d.tar.gz' token=e.tar", "a pipe (a.tar, b.tgz, d.tar.gz)"), ("pipe:secret", "a pipe"),
    ],
)  # fmt: skip
def test_the_name_of_a_place(given: str, name: str):
    assert public_name(given) == name


def test_an_older_card_says_no_more_than_a_new_one_and_its_owners_words_stay():
    card = (
        "# x\n\nSee https://host.example/page?language=en and `/usr/bin`.\n\n"
        f"| pictures | `{URL}`, `{HOME}/a.tar`, 64 |\n"
        f"| steps | 3 |\n| began with | `runs/emoji64_dit` |\n\nThe error on held-out images ({URL}) was 0.5.\n"
    )
    assert published_card(card) == (
        "# x\n\nSee https://host.example/page?language=en and `/usr/bin`.\n\n"
        "| pictures | `https://host.example:8080/set/{00000..00003}.tar`, `a.tar`, 64 |\n| steps | 3 |\n"
        "| began with | `emoji64_dit` |\n\n"
        "The error on held-out images (https://host.example:8080/set/{00000..00003}.tar) was 0.5.\n"
    )
