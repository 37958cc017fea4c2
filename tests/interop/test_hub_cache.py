"""Models in the Hub's cache, whose files are links to blobs/: they load, by folder and by name, and are exported."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from helpers.stable_diffusion import stable_diffusion

from ldm import TextToImage
from ldm.cli import run_command
from ldm.export import arguments, main
from ldm.inference.flags import load_keywords
from ldm.interop.diffusers_layout.folder import read_folder, write_folder
from ldm.interop.hub_cache import cache_folder, is_own_file, missing_model, model_path
from ldm.interop.model_card import CARD
from ldm.interop.read_model import model_name

REVISION = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/some-model"


def cached(source: Path, hub: Path, *, revision: str = REVISION) -> Path:
    """Lays a model out as huggingface_hub's cache does; returns its snapshot."""
    repository = hub / f"models--{NAME.replace('/', '--')}"
    for folder in ("blobs", "refs"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(revision)
    for file in (file for file in source.rglob("*") if file.is_file()):
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        link = repository / "snapshots" / revision / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repository / "snapshots" / revision


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    beside = {CARD: b"# a card", "assets/samples.png": b"a picture"}
    write_folder(stable_diffusion(1), folder, dtype=torch.float32, beside=beside)
    return folder


@pytest.fixture
def hub(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    cached(exported, tmp_path / "home" / "hub")
    return tmp_path / "home" / "hub"


def test_our_own_export_loads_from_the_cache_and_is_exported_with_its_card(hub: Path, tmp_path: Path):
    snapshot = model_path(NAME)
    assert snapshot.name == REVISION and (snapshot / "foundry.yaml").is_symlink()
    assert run_command(main, arguments(), [NAME, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / CARD).read_bytes() == b"# a card"
    assert (tmp_path / "out" / "assets" / "samples.png").read_bytes() == b"a picture"
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


def test_a_name_is_found_from_python_under_its_own_name(hub: Path):
    assert TextToImage.load(NAME).name == "some-model"
    file = next((hub.parent).rglob("unet/*.safetensors"))
    assert model_name(file) == "diffusion_pytorch_model"  # not the digest that the link leads to


def test_the_newest_revision_is_the_one_that_main_names(hub: Path, exported: Path):
    assert model_path(NAME).name == REVISION
    other = cached(exported, hub, revision="f" * 40)
    assert model_path(NAME) == other
    (other.parent.parent / "refs" / "main").unlink()
    os.utime(other, (1, 1))
    assert model_path(NAME).name == REVISION  # the newest by date


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"HF_HUB_CACHE": "/a"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/b"}, "/b"),
        ({"HF_HOME": "/c"}, "/c/hub"),
        ({"XDG_CACHE_HOME": "/d"}, "/d/huggingface/hub"),
        ({}, str(Path.home() / ".cache/huggingface/hub")),
    ],
)
def test_the_cache_is_where_the_hubs_library_has_it(variables, expected, monkeypatch: pytest.MonkeyPatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == expected


def test_a_name_that_is_not_in_the_cache_is_told_from_a_path(hub: Path, tmp_path: Path):
    from argparse import Namespace

    assert model_path("runwayml/stable-diffusion-v1-5") == Path("runwayml/stable-diffusion-v1-5")
    with pytest.raises(FileNotFoundError, match=r"nor one of that name in the Hub's cache \(.*hub\).*hf download"):
        TextToImage.load("runwayml/stable-diffusion-v1-5")
    told = missing_model(tmp_path / "a" / "b" / "c")
    assert "Hub" not in told and told.endswith("give the folder or file of one")
    with pytest.raises(FileNotFoundError, match="no model at x/y, nor one of that name .* with --ckpt"):
        load_keywords(Namespace(ckpt=Path("x/y"), vae=None, text=None, lora=[], embedding=[], lora_folder=[]))


def test_a_folder_of_that_name_comes_first(hub: Path, tmp_path: Path):
    (tmp_path / NAME).mkdir(parents=True)
    assert model_path(NAME) == Path(NAME)


def test_a_link_out_of_the_cache_is_not_published(hub: Path, tmp_path: Path):
    """Not even under a blob's name, through a link among the blobs, or from another model's blobs."""
    snapshot, secret = model_path(NAME), tmp_path / "secret"
    secret.write_text("secret")
    blobs, other = snapshot.parent.parent / "blobs", hub / "models--a--b" / "blobs"
    other.mkdir(parents=True)
    (other / "abc").write_text("secret")
    (blobs / "not-a-digest").write_text("secret")
    (blobs / "0ff").symlink_to(secret)
    for target in (secret, blobs / "0ff", blobs / "not-a-digest", other / "abc", Path("/etc/passwd")):
        (snapshot / "foundry.yaml").unlink()
        (snapshot / "foundry.yaml").symlink_to(target)
        assert not is_own_file(snapshot / "foundry.yaml", snapshot)
        with pytest.raises(ValueError, match=r"foundry.yaml is not a plain file of the model, but a link to"):
            read_folder(snapshot, dtype=torch.float32)
    (snapshot / "foundry.yaml").unlink()
    (snapshot / "foundry.yaml").write_text("a: 1")  # the remedy
    assert read_folder(snapshot, dtype=torch.float32).notes == "a: 1"


def test_blobs_that_are_a_link_themselves_protect_nothing(tmp_path: Path):
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "0a").write_text("secret")
    (tmp_path / "hub" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "hub" / "blobs").symlink_to(tmp_path / "private")
    link = tmp_path / "hub" / "snapshots" / "1" / "foundry.yaml"
    link.symlink_to("../../blobs/0a")
    assert link.read_text() == "secret" and not is_own_file(link, link.parent)
