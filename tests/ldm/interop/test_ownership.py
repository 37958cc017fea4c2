"""Whose a model is goes with it: licence, credits and their files, from what it began with to what is published."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from helpers.forking import ROOT
from helpers.launching import DIT, denoiser_config, start
from helpers.stable_diffusion import stable_diffusion
from safetensors import safe_open

from ldm import DrawRequest, TextToImage
from ldm.cli import run_command
from ldm.export import arguments, main
from ldm.inference.recipe import png_bytes
from ldm.interop.compvis.writing import write_single_file
from ldm.interop.diffusers_layout.folder import write_folder
from ldm.interop.model_card import CARD
from ldm.interop.ownership import inherited, ownership_of
from ldm.model.ownership import PublishConfig

SHIPPED = ROOT / "weights" / "emoji64"
ARTISTS = "Twemoji", "CC-BY 4.0", "Noto Emoji"
ASKED = PublishConfig(license="cc-by-4.0", datasets=("949 stamps",), credits=("Stamps, drawn by Bob",))


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n")[1])


def export_command(*words: object) -> int:
    return run_command(main, arguments(), [str(word) for word in words])


def test_the_shipped_model_says_whose_it_is():
    found = ownership_of(SHIPPED)
    assert found.name == "emoji64" and found.publish.license == "apache-2.0"
    assert all(word in "\n".join(found.publish.credits) for word in ARTISTS)
    assert set(found.files) == {"LICENSE", "NOTICE"}


@pytest.mark.parametrize("use", ["start", "part"])
def test_a_run_inherits_what_it_begins_with(use: str):
    """Also when only an autoencoder or a text encoder is used."""
    own = PublishConfig(credits=("mine",), datasets=("stamps",))
    found = inherited(own, start=SHIPPED if use == "start" else None, parts=[SHIPPED] * 2)
    assert found.license == "apache-2.0" and found.base_model == ("emoji64" if use == "start" else None)
    assert found.credits[0] == "mine" and len(found.credits) == 2
    assert all(word in found.credits[1] for word in ARTISTS)
    assert inherited(ASKED, start=SHIPPED, parts=()).license == "cc-by-4.0"


def test_two_licences_are_others_and_an_older_card_is_read(tmp_path: Path):
    write_folder(stable_diffusion(1), tmp_path / "m", dtype=torch.float32, beside={CARD: b"---\nlicense: mit\n---\n"})
    assert ownership_of(tmp_path / "m").publish == PublishConfig(license="mit")
    assert inherited(PublishConfig(), start=tmp_path / "m", parts=[SHIPPED]).license == "other"
    (tmp_path / "m" / CARD).write_bytes(b"---\nlicense: [a, &b]\n---\n\xff")
    assert ownership_of(tmp_path / "m").publish == PublishConfig()


def test_files_that_a_link_leads_to_elsewhere_are_not_taken(tmp_path: Path):
    (tmp_path / "private").write_text("secret")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "LICENSE").symlink_to(tmp_path / "private")
    (tmp_path / "m" / "NOTICE").write_text("of Bob")
    found = ownership_of(tmp_path / "m")
    assert found.files == {"NOTICE": b"of Bob"} and found.publish.credits == ("of Bob",)
    assert found.for_a_part() == {"NOTICE-m": b"of Bob"}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"license": "CC BY 4.0"}, "publish.license is 'CC BY 4.0', expected an identifier of the Hub, as cc-by-4.0"),
        ({"datasets": ("a\nb",)}, "publish.datasets and publish.base_model are names, each on one line"),
        ({"credits": (" ",)}, "publish.credits has an empty entry: remove it"),
    ],
)
def test_what_cannot_be_published_so(settings: dict, told: str):
    with pytest.raises(ValueError, match=told):
        PublishConfig(**settings)


def test_what_is_exported_of_the_shipped_model_carries_its_files(tmp_path: Path):
    for words in ([], ["--fp16"]):
        assert export_command(SHIPPED, tmp_path / "out", *words) == 0
        for name in ("LICENSE", "NOTICE"):
            assert (tmp_path / "out" / name).read_bytes() == (SHIPPED / name).read_bytes()
        assert "license: apache-2.0" in (tmp_path / "out" / CARD).read_text()
    TextToImage.load(SHIPPED).save(tmp_path / "saved")
    card = (tmp_path / "saved" / CARD).read_text()
    assert front_matter(card)["license"] == "apache-2.0" and all(word in card for word in ARTISTS)
    assert (tmp_path / "saved" / "NOTICE").exists()


def test_an_autoencoder_that_is_given_brings_its_owners(tmp_path: Path):
    write_folder(stable_diffusion(1), tmp_path / "a", dtype=torch.float32)
    write_folder(stable_diffusion(1), tmp_path / "b", dtype=torch.float32, beside={"NOTICE": b"of Bob"})
    pipe = TextToImage.load(tmp_path / "a", vae=tmp_path / "b")
    pipe.save(tmp_path / "c")
    pipe.save(tmp_path / "c.safetensors", format="single-file")
    assert (tmp_path / "c" / "NOTICE-b").read_text() == "of Bob" and "- of Bob\n" in (tmp_path / "c" / CARD).read_text()
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert file.metadata()["foundry.credits"] == "of Bob"
    TextToImage.load(tmp_path / "c.safetensors").save(tmp_path / "d")
    assert "- of Bob\n" in (tmp_path / "d" / CARD).read_text()


def test_a_run_publishes_its_owners_and_nothing_private(few_emoji: str, tmp_path: Path):
    """Shards from a pipe with a password in its command; parts of the shipped model by their full paths."""
    shards = sorted(Path(few_emoji).parent.glob("*.tar.gz"))
    pipes = [f"pipe:: Bearer SECRET; cat {shard}" for shard in shards]
    manifest = json.loads((shards[0].parent / "manifest.json").read_text())
    entries = {pipe: manifest[shard.name] for pipe, shard in zip(pipes, shards, strict=True)}
    (tmp_path / "m.json").write_text(json.dumps(entries))
    model = {"vae": str(SHIPPED), "text": str(SHIPPED)}
    config = yaml.safe_load(Path(denoiser_config(tmp_path, "r", few_emoji, DIT, **model)).read_text())
    config["data"] |= {"shards": pipes, "allow_pipe": True, "manifest": str(tmp_path / "m.json")}
    config["publish"] = {"license": "cc-by-4.0", "datasets": ["16 emoji"], "credits": ["Drawn by Bob, CC-BY"]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(config))
    done = start(["ldm/train.py", "--config", str(tmp_path / "r.yaml"), "run.steps=1"])
    assert (done.returncode, done.stderr) == (0, "") and "SECRET" not in done.stdout
    run, out = tmp_path / "runs/r", tmp_path / "out"
    assert export_command(run, out) == 0
    for folder in (out, run / "model"):
        for file in (path for path in folder.rglob("*") if path.is_file()):
            content = file.read_bytes()
            assert not [word for word in ("SECRET", str(tmp_path), str(ROOT)) if word.encode() in content], file
        assert {"LICENSE-emoji64", "NOTICE-emoji64"} <= {path.name for path in folder.iterdir()}
    assert b"SECRET" not in (run / "metrics.jsonl").read_bytes()
    card = (out / CARD).read_text()
    assert front_matter(card)["license"] == "cc-by-4.0" and front_matter(card)["datasets"] == ["16 emoji"]
    assert "It was trained on 16 pictures of 16 emoji." in card and "- Drawn by Bob, CC-BY\n" in card
    assert all(word in card for word in ARTISTS) and "`LICENSE-emoji64`, `NOTICE-emoji64`" in card

    second = denoiser_config(tmp_path, "s", few_emoji, DIT, **model, start=str(run))
    done = start(["ldm/train.py", "--config", second, "run.steps=1"])
    assert (done.returncode, done.stderr) == (0, "")
    assert export_command(tmp_path / "runs/s", tmp_path / "out2") == 0
    card = (tmp_path / "out2" / CARD).read_text()
    assert front_matter(card) | {"license": "other", "base_model": "r", "datasets": ["16 emoji"]} == front_matter(card)
    assert "- Drawn by Bob, CC-BY\n" in card and all(word in card for word in ARTISTS)
    assert {"LICENSE-emoji64", "NOTICE-emoji64"} <= set(os.listdir(tmp_path / "out2"))


def test_an_export_without_a_licence_says_so_and_how_to_add_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_folder(stable_diffusion(1), tmp_path / "r/model", dtype=torch.float32)
    (tmp_path / "r/config.yaml").write_text("kind: denoiser\n")
    assert export_command(tmp_path / "r", tmp_path / "out") == 0
    assert capsys.readouterr().err == (
        "warning: the model card of out names no licence: write one into its README.md, which later exports keep, or "
        "train with publish.license\n"
    )
    card = (tmp_path / "out" / CARD).read_text().replace("---\n", "---\nlicense: mit\n", 1)
    (tmp_path / "out" / CARD).write_text(card)
    assert export_command(tmp_path / "r", tmp_path / "out") == 0
    assert (tmp_path / "out" / CARD).read_text() == card
    assert ownership_of(tmp_path / "out").publish.license == "mit"


def test_a_picture_names_its_model_and_no_place(tmp_path: Path):
    """By the absolute path of everything that it was drawn with."""
    write_folder(stable_diffusion(1), tmp_path / "a", dtype=torch.float32)
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / "vae", tmp_path / "b" / "vae")
    pipe = TextToImage.load(tmp_path / "a", vae=tmp_path / "b", device="cpu")
    ((image, recipe),) = pipe.draw(DrawRequest(prompt="x", steps=1, seed=1))
    content = png_bytes(image, [recipe])
    assert b'"model": "a"' in content and str(tmp_path.parent).encode() not in content


def test_a_run_of_an_autoencoder_says_whose_it_is(tmp_path: Path):
    (tmp_path / "my_vae" / "vae").mkdir(parents=True)
    config = tmp_path / "my_vae" / "config.yaml"
    config.write_text("kind: vae\npublish: {license: mit, credits: [of Bob], pictures: 3}\n")
    found = inherited(PublishConfig(), start=None, parts=[tmp_path / "my_vae"])
    assert found == PublishConfig(license="mit", credits=("of Bob",))
    config.write_text("publish: {of_a_later_version: 1}\n")
    assert inherited(PublishConfig(), start=None, parts=[tmp_path / "my_vae"]) == PublishConfig()


def test_a_single_file_states_its_licence_and_passes_it_on(tmp_path: Path):
    notes = "publish: {license: mit, credits: [of Bob]}\ndata: {shards: /home/alice/a.tar}\n"
    write_single_file(replace(stable_diffusion(1), notes=notes), tmp_path / "m.safetensors", dtype=torch.float32)
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        header = file.metadata()
    assert header["modelspec.license"] == "mit" and "alice" not in str(header)
    assert ownership_of(tmp_path / "m.safetensors").publish == PublishConfig(license="mit", credits=("of Bob",))
    assert ownership_of(tmp_path / "no.safetensors").publish == PublishConfig()
