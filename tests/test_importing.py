"""Installed, from a wheel or as a link to the repository, our packages are found from anywhere, and hide nobody's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from helpers.forking import ROOT
from helpers.installing import CODE, installed, sources

import latent_foundry
import ldm
from latent_foundry import OFFERED

WHOSE = "WHOSE = 'theirs'"
# Each folder's own modules say whose they are, and the program asks for them after ours.
AWKWARD: dict[str, dict[str, str]] = {
    "empty": {},
    "pictures in data": {"data/cat.png": "", "data/cat.txt": "a cat"},
    "a package data": {"data/__init__.py": "", "data/shards.py": WHOSE},
    "data.py": {"data.py": WHOSE},
    "text and vae": {"text/__init__.py": "", "text/tokenizer.py": WHOSE, "vae.py": WHOSE},
    "a namespace ldm": {"ldm/util.py": WHOSE, "data.py": WHOSE},
    "a package ldm": {"ldm/__init__.py": "", "ldm/util.py": WHOSE, "ldm/model.py": WHOSE},
    "names of our own": {"tests/__init__.py": "", "config.py": "", "training.py": "", "model.py": WHOSE},
}
THEIRS = {
    "a package data": ["data.shards"],
    "data.py": ["data"],
    "text and vae": ["text.tokenizer", "vae"],
    "a namespace ldm": ["ldm.util", "data"],
    "a package ldm": ["ldm.util", "ldm.model"],
    "names of our own": ["model"],
}
PROGRAM = """
import importlib, sys
ours, *theirs = sys.argv[1:]
picture_maker = importlib.import_module(ours).TextToImage
assert picture_maker.__module__ == f"{ours}.inference.pipeline", picture_maker.__module__
for name in ("vae.autoencoder", "text.tokenizer", "data.shards", "data.manifest", "training.task"):
    module = importlib.import_module(f"{ours}.{name}")
    assert module.__name__ == f"{ours}.{name}" and not hasattr(module, "WHOSE"), module
for name in theirs:
    assert importlib.import_module(name).WHOSE == "theirs", name
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def from_wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(source, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def as_link(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(source, tmp_path_factory.mktemp("link"), "editable")


def run(python: Path, folder: Path, *arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fill(folder: Path, name: str) -> list[str]:
    """Makes one of the awkward folders, and says what is to be imported there."""
    for path, content in AWKWARD[name].items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    ours = "latent_foundry" if name == "a package ldm" else "ldm"
    return [ours, *THEIRS.get(name, [])]


@pytest.mark.parametrize("name", AWKWARD)
def test_a_wheel_is_found_from_anywhere(name: str, from_wheel: Path, tmp_path: Path):
    asked = fill(tmp_path, name)
    run(from_wheel, tmp_path, "-c", PROGRAM, *asked)


@pytest.mark.parametrize("name", ["a package data", "text and vae", "a package ldm"])
def test_a_link_to_the_repository_is_found_from_anywhere(name: str, as_link: Path, tmp_path: Path):
    asked = fill(tmp_path, name)
    run(as_link, tmp_path, "-c", PROGRAM, *asked)


@pytest.mark.parametrize("environment", ["from_wheel", "as_link"])
def test_commands_run_where_others_have_a_data_folder(environment: str, tmp_path: Path, request: pytest.FixtureRequest):
    python = request.getfixturevalue(environment)
    fill(tmp_path, "data.py")
    for command in ("ldm.export", "ldm.data.manifest", "txt2img"):
        assert "usage:" in run(python, tmp_path, "-m", command, "--help")


def test_a_program_in_the_repository_has_one_copy_of_each_module(tmp_path: Path):
    program = """
import vae.autoencoder, ldm.vae.autoencoder, latent_foundry.vae.autoencoder, latent_foundry.config, ldm.config
assert vae.autoencoder is ldm.vae.autoencoder is latent_foundry.vae.autoencoder
assert latent_foundry.config is ldm.config
assert vae.autoencoder.__spec__.name == "vae.autoencoder"
assert not hasattr(ldm, "nothing")
"""
    run(Path(sys.executable), ROOT, "-c", program)
    assert "usage:" in run(Path(sys.executable), ROOT, "-m", "ldm.data.manifest", "--help")


def test_everything_offered_is_there_and_named_where_it_is_read():
    assert set(ldm.__all__) == set(OFFERED)
    for name in ldm.__all__:
        assert getattr(ldm, name).__module__ == f"ldm.{OFFERED[name]}"
    with pytest.raises(AttributeError, match="module 'latent_foundry' has no attribute 'nothing'"):
        _ = latent_foundry.nothing


def test_a_wheel_holds_every_module(source: Path, from_wheel: Path):
    (wheel,) = from_wheel.parents[2].glob("*.whl")
    names = {name for name in ZipFile(wheel).namelist() if name.endswith(".py")}
    here = {str(path.relative_to(source)) for name in CODE for path in (source / name).rglob("*.py")}
    assert names == {name if name.startswith("ldm/") else f"ldm/{name}" for name in here} | {
        "latent_foundry.py",
        "txt2img.py",
    }
