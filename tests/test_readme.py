"""The commands and the Python of the README and of docs/ run, shortened by overrides; the files they name exist.

Those of docs/extending.md are run by test_extending.py."""

import dataclasses
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from helpers.forking import ROOT, python_here
from helpers.stable_diffusion import stable_diffusion
from PIL import Image
from safetensors.torch import save_file

import txt2img
from data.shards import Shard
from ldm import export
from ldm.cli import run_command
from ldm.inference.recipe import read_recipes
from ldm.interop.compvis.writing import single_file_tensors
from ldm.interop.diffusers_layout.folder import write_folder
from ldm.training.clip_task import TextTrainConfig
from ldm.training.denoiser_config import TrainConfig

PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "extending.md")]
BIN = ".venv/bin/"


def blocks(page: str, language: str = "") -> list[str]:
    """Return the blocks of a page in this language, "" for commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    return [text for shown, text in found if shown == language]


def lines(page: str) -> list[str]:
    return [line.split("  #")[0].strip() for block in blocks(page) for line in block.splitlines()]


# Each once, whatever the number of pages that show it.
COMMANDS = list(dict.fromkeys(line for page in PAGES for line in lines(str(page)) if line.startswith(BIN)))
OWN_PICTURES = [command for command in COMMANDS if "runs/my_" in command or "run.name=my_" in command]
TRAINING = [command for command in COMMANDS if "/train.py" in command and command not in OWN_PICTURES]
DRAWING = [
    command
    for command in COMMANDS
    if "txt2img.py --" in command and not re.search("--ckpt (?!runs/emoji64)|--help", command)
]
THEIR_WEIGHTS = [command for command in COMMANDS if re.search("sd-v1|stable-diffusion-2|my-folder", command)]
THEIR_FILE = re.compile(
    r"(sd-v1|stable-diffusion-2|checkpoint-|my-|photo|mask|ft-mse|style|light)[\w./-]*[.\w](:0\.8)?$"
)
EXPORT = next(command for command in COMMANDS if "ldm.export runs/" in command)
SHORT = [
    "run.steps=1",
    "data.lanes=1",
    "data.batch_size=8",
    "data.prefetch=0",
]


def run(command: str, *extra: str, launched: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a command: launched, as it is shown; else without a launcher, in a process that has the imports already."""
    program, *words = shlex.split(command)
    if not launched:
        return python_here().complete(*words, *extra)
    program = str(Path(sys.executable).parent / program.removeprefix(BIN))
    if program.endswith("/deepspeed"):
        with socket.socket() as probe:  # its own port may be taken by somebody's training
            probe.bind(("127.0.0.1", 0))
            words = ["--master_port", str(probe.getsockname()[1]), *words]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"OMP_NUM_THREADS": "2"} | os.environ | {"PATH": path}
    words = [program, *words, *extra]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


def test_the_pages_show_a_command_for_everything():
    """A search that finds nothing would let everything pass."""
    shown = " ".join(COMMANDS)
    for script in ("vae/train.py", "text/train.py", "ldm/train.py", "txt2img.py", "ldm.export"):
        assert script in shown
    assert "make demo" in lines("README.md") and "make test" in lines("CONTRIBUTING.md")
    assert (len(TRAINING), len(OWN_PICTURES), len(THEIR_WEIGHTS)) == (4, 4, 8) and len(DRAWING) >= 4


def test_the_readmes_first_page_is_one_picture_and_two_commands():
    first = (ROOT / "README.md").read_text().split("## What it can")[0]
    (picture,) = re.findall(r"!\[.*\]\((.*)\)", first)
    assert (ROOT / picture).stat().st_size < 300_000
    install, draw = lines("README.md")[:2]
    assert install == "python3 -m venv .venv && .venv/bin/python -m pip install -e ." and draw in DRAWING
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_command_of_the_pages_is_run_by_a_test():
    tested = {
        *TRAINING,
        *OWN_PICTURES,
        *DRAWING,
        *THEIR_WEIGHTS,
        *(command for command in COMMANDS if "--help" in command),
    }
    assert [command for command in COMMANDS if command not in tested] == [EXPORT]


def test_one_device_needs_no_launcher_and_several_keep_its_lines_away():
    """A launcher's own lines would hide ours."""
    shown = [*TRAINING, *OWN_PICTURES]
    launched = [command for command in shown if command.startswith(f"{BIN}deepspeed")]
    assert shown[0].startswith(f"{BIN}python ") and launched
    assert all(command.startswith(f"{BIN}deepspeed --log_level critical --num_gpus ") for command in launched)
    assert "deepspeed" not in subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout


MODULES = sorted({name for page in PAGES for name in re.findall(r"python -m ((?:data|ldm)[\w.]+)", page.read_text())})


@pytest.mark.parametrize("module", MODULES)
def test_what_the_pages_call_a_module_answers(module):
    help_asked = python_here().complete("-m", module, "--help")
    assert (help_asked.returncode, help_asked.stderr) == (0, "") and "usage" in help_asked.stdout


def test_a_module_that_is_no_command_says_so():
    done = subprocess.run([sys.executable, "-m", "data.write", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: data.write is no command: docs/training.md packs")


@pytest.mark.parametrize("command", TRAINING, ids=lambda command: command.split()[1])
def test_training_commands_train(command, tmp_path, few_emoji):
    drawings = ["preview.steps=2", "preview.pictures=2"] if "ldm/train.py" in command else []
    few = [f"data.shards=[{few_emoji}]", f"validation.shards=[{few_emoji}]"]
    lanes = ["data.lanes=2"] if "--num_gpus 2" in command else []
    extra = [*SHORT, *lanes, *few, *drawings, f"run.folder={tmp_path}", "run.log_every=1"]
    finished = run(command, *extra, launched="ldm/train.py" in command)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    if command.startswith(f"{BIN}python"):
        assert finished.stderr == ""
    assert "step 1/1  loss" in finished.stdout


@pytest.mark.parametrize("command", DRAWING)
def test_drawing_commands_draw(command, tmp_path):
    extra = ["--outdir", str(tmp_path), "--steps", "2"]
    launched = command == DRAWING[0]
    finished = run(command.replace("runs/emoji64_dit", "weights/emoji64"), *extra, launched=launched)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "grid-0000.png").exists()
    assert (tmp_path / "samples" / "00003.png").exists()


def test_the_export_command_exports(tmp_path):
    words = EXPORT.replace("runs/emoji64_dit", "weights/emoji64").replace("my-weights", str(tmp_path / "w"))
    assert run(words).returncode == 0
    assert (tmp_path / "w" / "model_index.json").exists()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A folder of what docs/interchange.md calls by name: Stable Diffusion in miniature, LoRAs, pictures."""
    folder = tmp_path_factory.mktemp("theirs")
    for name, parts in {
        "sd-v1-5": stable_diffusion(1),
        "sd-v1-5-inpainting": stable_diffusion(1, inpainting=True),
    }.items():
        tensors = {key: tensor.contiguous() for key, tensor in single_file_tensors(parts).items()}
        save_file(tensors, folder / f"{name}.safetensors")
        torch.save({"state_dict": tensors}, folder / f"{name}.ckpt")
    write_folder(stable_diffusion(1), folder / "sd-v1-5", dtype=torch.float32)
    shutil.copytree(folder / "sd-v1-5" / "unet", folder / "checkpoint-500" / "unet")
    write_folder(stable_diffusion(2, prediction="v"), folder / "stable-diffusion-2-1", dtype=torch.float32)
    save_file(dict(stable_diffusion(1).model.vae.state_dict()), folder / "ft-mse.safetensors")
    for name in ("style", "light"):
        layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
        factors = {f"{layer}.lora_down.weight": torch.ones(2, 128), f"{layer}.lora_up.weight": torch.ones(128, 2)}
        save_file(factors, folder / f"{name}.safetensors")
    Image.new("RGB", (32, 32), "red").save(folder / "photo.png")
    Image.new("L", (32, 32), "white").save(folder / "mask.png")
    return folder


@pytest.mark.parametrize("command", THEIR_WEIGHTS, ids=lambda command: " ".join(command.split()[1:5]))
def test_commands_for_stable_diffusions_weights(command, theirs, capsys):
    """In the page's order: what one writes, the next may read. In this process, which has all imports already."""
    words = [str(theirs / word) if THEIR_FILE.match(word) else word for word in shlex.split(command)]
    short = ["--outdir", str(theirs / "out"), "--steps", "3", "--n-samples", "1"] if "txt2img.py" in words else []
    if short and "--init-img" not in words:
        short += ["--H", "32", "--W", "32"]
    if short:
        code = run_command(txt2img.main, txt2img.build_parser(), [*words[2:], *short])
    else:
        code = run_command(export.main, export.arguments(), words[3:])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert "sheet" in shown.out if short else (theirs / words[4]).exists()


def test_the_demo_draws_six_prompts():
    """make is only asked what it would do; continuous integration runs it."""
    plan = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in plan.splitlines() if "txt2img.py" in line and not line.startswith("echo")]
    args = txt2img.build_parser().parse_args(shlex.split(line)[2:])
    assert len(args.prompt) == 6
    assert all(re.match("a (noto|twemoji) emoji of ", prompt) for prompt in args.prompt)
    assert args.ckpt == ROOT / "weights" / "emoji64"


def run_python(page: str, number: int = 0) -> dict[str, Any]:
    """Run one of a page's blocks of Python, with few steps, in the current folder."""
    scope: dict[str, Any] = {}
    exec(blocks(page, "python")[number].replace("steps=30", "steps=2"), scope)
    return scope


@pytest.mark.parametrize("page", ["README.md", "docs/drawing.md"])
def test_the_python_examples_run(page, tmp_path, monkeypatch):
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.chdir(tmp_path)
    scope = run_python(page)
    assert len(scope["images"]) == 4
    assert page == "README.md" or len(scope["drawings"]) == 4 and (tmp_path / "apple.png").exists()


def test_the_example_of_lists_and_a_callback_runs(tmp_path, monkeypatch):
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.chdir(tmp_path)
    scope = run_python("docs/drawing.md", 1)
    assert [len(pictures) for pictures in scope["previews"]] == [2, 2]
    assert read_recipes(tmp_path / "cat.png")[0].seed == 3


def make_pictures(folder: Path) -> None:
    """Write a folder of captioned pictures, as docs/training.md expects it."""
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (80 + number, 96), (12 * number, 90, 200)).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(f"a kite, number {number}\n")


def test_a_folder_of_pictures_becomes_shards(tmp_path, monkeypatch):
    make_pictures(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    run_python("docs/training.md")
    held_out, training = (sorted((tmp_path / "shards" / name).iterdir()) for name in ("val", "train"))
    assert [len(Shard(path)) for path in held_out] == [1]
    assert len(training) == 8 and sum(len(Shard(path)) for path in training) == 19
    sample = Shard(held_out[0])[0]
    assert sample.key == "0000" and sample.members["txt"] == b"a kite, number 0\n" and "png" in sample.members


def test_the_commands_for_ones_own_pictures_lead_to_a_drawing(tmp_path, monkeypatch):
    make_pictures(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    run_python("docs/training.md")
    short = [
        "run.steps=1",
        "data.batch_size=8",
        "data.prefetch=0",
        "validation.batch_size=8",
        f"run.folder={tmp_path}/runs",
    ]
    for command in OWN_PICTURES:
        words = re.sub(r"(shards|runs)/", rf"{tmp_path}/\1/", command)
        extra = short if "/train.py" in command else ["--outdir", str(tmp_path / "out"), "--steps", "2"]
        preview = ["preview.steps=2", "preview.pictures=1"] if "ldm/train.py" in command else []
        finished = run(words, *extra, *preview)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (tmp_path / "out" / "grid-0000.png").exists()


@pytest.mark.parametrize("page", ["README.md", "docs/drawing.md", "docs/interchange.md"])
def test_the_options_that_are_explained_exist(page):
    known = {*txt2img.build_parser()._option_string_actions, *export.arguments()._option_string_actions}
    spans = re.findall(r"`([^`\n]+)`", (ROOT / page).read_text())
    named = {word for span in spans for word in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", span)}
    assert named <= known | {"--version"}  # of benchmarks/interchange.py
    assert page == "README.md" or {"--mask", "--lora", "--no-ema", "--prediction"} <= named


def settings_of(config: Any) -> set[str]:
    """Return the names of the settings in all sections of a configuration: "run.steps"."""
    sections = {field.name: get_type_hints(config)[field.name] for field in dataclasses.fields(config)}
    return {
        f"{section}.{field.name}"
        for section, kind in sections.items()
        if dataclasses.is_dataclass(kind)
        for field in dataclasses.fields(kind)
    }


def test_the_settings_that_are_explained_exist():
    kinds = {"model.denoiser.sample_size", "model.objective.prediction"}  # of settings that depend on a kind
    known = settings_of(TrainConfig) | settings_of(TextTrainConfig) | kinds
    pages = ("training", "gpu", "reliability", "data")
    spans = [span for page in pages for span in re.findall(r"`([^`\n]+)`", (ROOT / "docs" / f"{page}.md").read_text())]
    sections = "run|data|validation|engine|optim|model|preview|image"
    named = {word for span in spans for word in re.findall(rf"(?<![\w./])(?:{sections})\.[a-z_.]+\b(?!/)", span)}
    assert {"engine.zero_stage", "optim.ema_lengths", "data.lanes"} <= named
    modules = {word for word in named if (ROOT / f"{word.replace('.', '/')}.py").exists()}  # data.write
    files = {word for word in named if word.endswith((".py", ".md", ".json"))}
    assert not named - known - modules - files


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    folders = "configs|data|docs|weights|benchmarks|vae|text|ldm|examples|tests"
    named = set(re.findall(rf"`((?:{folders})/[\w./-]*)`", page.read_text()))
    assert not [name for name in named if not (ROOT / name).exists()]
    assert named or page.name not in ("tour.md", "training.md", "interchange.md")
