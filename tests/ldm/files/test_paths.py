"""Paths as people write them: ~ is the home folder wherever a path is read from text."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

import pytest

from ldm import TextToImage
from ldm.config import load_config
from ldm.export import arguments
from ldm.files.paths import contents, user_path
from ldm.inference.flags import add_options
from ldm.inference.options import parse_embedding_argument, parse_lora_argument
from ldm.interop.embedding_files import embedding_source
from ldm.interop.hub_cache import model_path
from ldm.training.denoiser_config import TrainConfig
from ldm.training.run import RunConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


def test_a_tilde_is_the_home_folder_at_the_beginning_alone(home: Path):
    assert user_path("~/x") == user_path(Path("~/x")) == home / "x"
    assert user_path("~") == home
    assert [user_path(text) for text in ("a/~/x", "x~")] == [Path("a/~/x"), Path("x~")]
    assert user_path(user_path("./~/x")) == Path.cwd() / "~" / "x"
    with pytest.raises(
        ValueError, match=r"~nobody-here/x: there is no home folder of that name: .* or \./~nobody-here"
    ):
        user_path("~nobody-here/x")


def test_options_take_it(home: Path):
    parser = ArgumentParser()
    add_options(parser, weights=Path("w"))
    words = ["--ckpt=~/m", "--vae=~/v", "--text=~/t", "--outdir=~/o", "--from-file=~/p", "--lora-folder=~/l"]
    args = parser.parse_args([*words, "--init-img=~/i.png", "--mask=~/k.png"])
    found = [args.ckpt, args.vae, args.text, args.outdir, args.from_file, args.lora_folder[0], args.image, args.mask]
    assert found == [home / name for name in ("m", "v", "t", "o", "p", "l", "i.png", "k.png")]
    assert parse_lora_argument("~/l.safetensors:0.5") == (home / "l.safetensors", 0.5)
    assert parse_embedding_argument("name=~/e.pt") == (home / "e.pt", "name")
    exported = arguments().parse_args(["~/runs/x", "~/out"])
    assert (exported.source, exported.target) == (home / "runs/x", home / "out")


def test_python_takes_it(home: Path):
    (home / "m").symlink_to(ROOT / "weights/emoji64")
    assert model_path("~/m") == home / "m" and embedding_source("~/e.pt").path == home / "e.pt"
    pipe = TextToImage.load("~/m")
    pipe.save("~/copy")
    assert (home / "copy/model_index.json").exists()


def test_configurations_take_it(home: Path):
    (home / "c.yaml").write_text((ROOT / "configs/demo.yaml").read_text())
    assert load_config(TrainConfig, "~/c.yaml", ["run.folder=~/runs"]).run.path == home / "runs/demo"
    assert RunConfig(name="x", steps=1).path == Path("runs/x")
    assert not list((home.parent / "here").iterdir())


def test_what_a_folder_holds_is_counted_by_ending(tmp_path: Path):
    assert contents(tmp_path) == "nothing"
    (tmp_path / "a").mkdir()
    for name in ("1.png", "2.PNG", "1.txt", "README", "x.a", "x.b", "x.c"):
        (tmp_path / name).touch()
    assert contents(tmp_path).startswith("1 folder, 2 .png, 1 ") and contents(tmp_path).endswith(", ...")
    assert len(contents(tmp_path).split(", ")) == 6
