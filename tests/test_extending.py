"""docs/extending.md: its examples, applied to a copy of the code, are two places each, and do what the page says."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.forking import Forking

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
SECTIONS = ("A sampler", "A denoiser", "A training")
BLOCK = re.compile(r"(?:^`([\w/.]+)`:\n\n)?^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
CODE = ("ldm", "vae", "text", "data", "configs", "txt2img.py", "pyproject.toml")
TESTS = ("conftest.py", "helpers", "ldm/conftest.py", "ldm/samplers", "ldm/denoisers")


class Block(NamedTuple):
    file: str  # "": a command, or a program
    language: str
    text: str


@cache
def blocks(section: str) -> list[Block]:
    (text,) = [part for part in PAGE.read_text().split("\n## ") if part.startswith(section + "\n")]
    return [Block(*found) for found in BLOCK.findall(text)]


def commands(section: str) -> list[str]:
    text = "".join(block.text for block in blocks(section) if not block.language)
    return [line.removeprefix(".venv/bin/") for line in text.splitlines()]


def changed(text: str, diff: str) -> str:
    """Apply a diff without line numbers, whose parts, between lines of "@@", each fit one place of the text."""
    for part in diff.split("@@\n"):
        lines = part.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        assert text.count("\n" + before) == 1, f"stands {text.count(before)} times:\n{before}"
        text = text.replace("\n" + before, "\n" + "".join(line[1:] for line in lines if line[0] in " +"))
    return text


def apply(section: str, tree: Path) -> tuple[list[str], list[str]]:
    """Write a section's files into a tree. Returns the new ones, and those that were there."""
    new, old = [], []
    for file, language, text in blocks(section):
        if not file:
            continue
        place = tree / file
        assert place.exists() == (language == "diff"), f"{file}: a new file is shown whole, an old one as a diff"
        (old if place.exists() else new).append(file)
        place.write_text(changed(place.read_text(), text) if language == "diff" else text)
    return new, old


def copy_of_the_code(tree: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "train", "unseen")  # the larger parts of data/emoji64
    for name in (*CODE, *(f"tests/{name}" for name in TESTS)):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=None if name.startswith("tests") else ignored)
        else:
            shutil.copy(ROOT / name, tree / name)
    (tree / "weights").symlink_to(ROOT / "weights")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code with all three examples."""
    tree = tmp_path_factory.mktemp("extended")
    copy_of_the_code(tree)
    for section in SECTIONS:
        apply(section, tree)
    return tree


@pytest.fixture(scope="module")
def python(tree: Path) -> Iterator[Forking]:
    forking = Forking(tree)
    yield forking
    forking.close()


def run_shown(python: Forking, command: str, *extra: str) -> str:
    program, *words = shlex.split(command)
    assert program == "python"
    return python.run(*words, *extra)


def short(shards: str) -> list[str]:
    """Overrides for a training on a few pictures."""
    settings = ["data.lanes=1", "data.batch_size=8", "data.prefetch=0", "run.log_every=1"]
    return [f"data.shards=[{shards}]", f"validation.shards=[{shards}]", *settings]


def losses(tree: Path, name: str) -> dict[int, float]:
    """The loss of each step."""
    lines = (tree / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines) if "loss" in record}


@pytest.mark.parametrize("section", SECTIONS)
def test_an_example_is_one_new_file_and_one_entry(section, tmp_path):
    for file in {block.file for block in blocks(section)} - {""}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, tmp_path / file)
    new, old = apply(section, tmp_path)
    assert [len([file for file in files if file.startswith("ldm/")]) for files in (new, old)] == [1, 1]
    assert [file for file in new + old if not file.startswith("ldm/")] == (
        ["configs/style_probe.yaml"] if section == "A training" else []
    )


def test_the_examples_keep_to_the_style(tree):
    ruff = Path(sys.executable).parent / "ruff"
    done = subprocess.run([ruff, "check", "ldm"], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_sampler_holds_its_contract_and_draws(tree, python):
    contract, drawing = commands("A sampler")
    assert " passed" in run_shown(python, contract, "-k", "kutta and not beta")  # of the paths, the two shortest
    assert "one of kutta, " in " ".join(python.run("txt2img.py", "--help").split())
    assert "sheet" in run_shown(python, drawing, "--n-samples", "1", "--outdir", "pictures")
    assert (tree / "pictures" / "samples" / "00000.png").exists()


def test_the_denoiser_holds_its_contract_is_trained_exported_and_loaded(tree, python, few_emoji):
    contract, training, drawing = commands("A denoiser")
    assert "4 passed" in run_shown(python, contract)
    preview = ["preview.steps=1", "preview.pictures=1", "preview.prompts=[a red apple]"]
    assert "step 2/2" in run_shown(python, training, *short(few_emoji), *preview, "run.steps=2")
    stored = json.loads((tree / "runs/mixer/model/denoiser/config.json").read_text())
    assert stored["config"] == {"kind": "mixer", "depth": 6, "width": 96}
    assert "a ConvMixer of 6 blocks" in run_shown(python, drawing, "--n-samples", "1", "--steps", "2")
    (program,) = [block.text for block in blocks("A denoiser") if block.language == "python" and not block.file]
    assert python.run("-c", f"{program}\nprint(len(images), images[0].size)") == "2 (64, 64)\n"


def test_the_training_learns_and_is_resumed(tree, python, few_emoji):
    (training,) = commands("A training")
    words = [*short(few_emoji), "run.checkpoint_every=3", "run.sample_every=3"]
    assert "step 3: held_out_right" in run_shown(python, training, *words, "run.steps=3")
    resumed = run_shown(python, training, *words, "run.steps=6")
    assert "step 4/6" in resumed and "step 3/6" not in resumed
    run_shown(python, training, *words, "run.steps=6", "run.name=whole")
    assert losses(tree, "style_probe") == losses(tree, "whole")
    assert list(losses(tree, "whole")) == [1, 2, 3, 4, 5, 6]
    weights = [(tree / "runs" / name / "probe.safetensors").read_bytes() for name in ("style_probe", "whole")]
    assert weights[0] == weights[1]
