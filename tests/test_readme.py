"""Every command that the README shows runs, shortened by overrides; and what it says of files is so."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.stable_diffusion import stable_diffusion
from PIL import Image
from safetensors.torch import save_file

import txt2img
from ldm import export
from ldm.cli.run import run_command
from ldm.interop.compvis.writing import single_file_tensors
from ldm.interop.diffusers_layout.folder import write_folder

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
BIN = ".venv/bin/"
COMMANDS = [
    line.split("  #")[0].strip()
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if line.startswith(BIN)
]
TRAINING = [command for command in COMMANDS if "/train.py" in command]
DRAWING = [command for command in COMMANDS if "txt2img.py" in command and "--ckpt" not in command]
THEIR_WEIGHTS = [command for command in COMMANDS if re.search("sd-v1|stable-diffusion-2|my-folder", command)]
THEIR_FILE = re.compile(r"(sd-v1|stable-diffusion-2|my-|photo|mask|ft-mse|style|light)[\w.-]*[.\w](:0\.8)?$")
# Small and short: the same pictures, two steps, one sheet.
SHORT = [
    "run.steps=1",
    "data.shards=[data/emoji64/val/*.tar.gz]",
    "data.lanes=1",
    "data.batch_size=8",
    "data.prefetch=0",
]


def run(command: str, *extra: str) -> subprocess.CompletedProcess[str]:
    program, *words = shlex.split(command)
    program = str(Path(sys.executable).parent / program.removeprefix(BIN))
    if program.endswith("/deepspeed"):
        with socket.socket() as probe:  # its own port may be taken by somebody's training
            probe.bind(("127.0.0.1", 0))
            words = ["--master_port", str(probe.getsockname()[1]), *words]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"OMP_NUM_THREADS": "2"} | os.environ | {"PATH": path}
    words = [program, *words, *extra]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


def test_the_readme_shows_a_command_for_everything():
    shown = " ".join(COMMANDS)
    for script in ("vae/train.py", "text/train.py", "ldm/train.py", "txt2img.py", "ldm.export"):
        assert script in shown
    assert {"make demo", "make test"} <= {line for _, block in BLOCKS for line in block.splitlines()}


@pytest.mark.parametrize("command", TRAINING, ids=lambda command: command.split()[1])
def test_training_commands_train(command, tmp_path):
    drawings = ["preview.steps=2", "preview.pictures=2"] if "ldm/train.py" in command else []
    finished = run(command, *SHORT, *drawings, f"run.folder={tmp_path}", "run.log_every=1")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "step 1/1  loss" in finished.stdout


@pytest.mark.parametrize("command", DRAWING)
def test_drawing_commands_draw(command, tmp_path):
    finished = run(command, "--outdir", str(tmp_path), "--steps", "2")
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "grid-0000.png").exists()
    assert (tmp_path / "samples" / "00003.png").exists()


def test_the_export_command_exports(tmp_path):
    (command,) = [command for command in COMMANDS if "ldm.export runs/" in command]
    words = command.replace("runs/emoji64_dit", "weights/emoji64").replace("my-weights", str(tmp_path / "w"))
    assert run(words).returncode == 0
    assert (tmp_path / "w" / "model_index.json").exists()


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A folder of what the README calls by name: Stable Diffusion in miniature, LoRAs, pictures."""
    folder = tmp_path_factory.mktemp("theirs")
    for name, parts in {
        "sd-v1-5": stable_diffusion(1),
        "sd-v1-5-inpainting": stable_diffusion(1, inpainting=True),
    }.items():
        tensors = {key: tensor.contiguous() for key, tensor in single_file_tensors(parts).items()}
        save_file(tensors, folder / f"{name}.safetensors")
        torch.save({"state_dict": tensors}, folder / f"{name}.ckpt")
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
    """In the README's order: what one writes, the next may read. In this process, which has all imports already."""
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


def test_the_python_example_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    code = next(block for language, block in BLOCKS if language == "python")
    scope: dict = {}
    exec(code.replace("steps=30", "steps=2"), scope)
    assert len(scope["images"]) == 4


def test_every_file_that_is_named_exists():
    named = set(re.findall(r"`((?:configs|data|docs|weights|benchmarks|vae|text|ldm)/[\w./-]*)`", README))
    named |= set(re.findall(r"\]\(([\w./-]+)\)", README))
    assert named
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
