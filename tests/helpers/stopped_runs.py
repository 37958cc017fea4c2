"""Trainings that are stopped at random, and what everybody who reads such a run must then read."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from helpers.forking import python_here
from helpers.launching import DIT, IMAGE, TEXT, VAE, denoiser_config, start, write_config
from ldm import TextToImage
from ldm.cli import run_command
from ldm.export import arguments
from ldm.export import main as export
from ldm.files.checkpoints import fault
from ldm.interop.fragments import Fragments
from ldm.interop.read_model import read_text, read_vae
from text.conversion import flattened, open_clip_to_transformers

STOPPER = Path(__file__).with_name("stop_at_step.py")
STEPS = 12
# Checkpoints and exports at different steps, as in all runs whose settings are the defaults but for one.
RUN = {"steps": STEPS, "log_every": 4, "sample_every": 5, "checkpoint_every": 3, "keep_checkpoints": 2}
SCRIPTS = {"vae": "vae/train.py", "clip": "text/train.py", "dit": "ldm/train.py"}
SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL", "none")


class Stop(NamedTuple):
    """How a training ends. damage: to its newest checkpoint, afterwards."""

    training: str  # of SCRIPTS
    signal: str
    step: int
    damage: bool = False


def random_stops(count: int, seed: int) -> list[Stop]:
    """Return stops at random steps, of each training and by each signal in turn; after some, the disk is damaged."""
    draw = random.Random(seed)
    stops: list[Stop] = []
    for number in range(count):
        training, by = list(SCRIPTS)[number % 3], SIGNALS[number // 3 % 4]
        damage = by == "SIGTERM" and number % 3 == number // 12 % 3
        first = 7 if by == "SIGKILL" else 4 if damage else 1  # by then a checkpoint is complete, another begun
        stops.append(Stop(training, by, draw.randint(first, STEPS - 1), damage))
    return stops


class Workshop:
    """Configurations of the three trainings on a few pictures. `weights`: a model whose frozen parts the third uses."""

    def __init__(self, folder: Path, shards: str, weights: Path) -> None:
        self.folder = folder
        frozen = {"vae": str(weights), "text": str(weights)}
        self.configs = {
            "vae": write_config(folder, "vae", shards, vae=VAE, loss={"perceptual": "none"}, run=self._run("vae")),
            "clip": write_config(folder, "clip", shards, text=TEXT, image=IMAGE, run=self._run("clip")),
            "dit": denoiser_config(folder, "dit", shards, DIT, **frozen),
        }

    def _run(self, name: str) -> dict[str, object]:
        return {**RUN, "name": name, "folder": str(self.folder / "runs")}

    def stopped(self, stop: Stop) -> Path:
        """Train until the stop; returns the run's folder, which is the only one of its training."""
        run = self.folder / "runs" / stop.training
        shutil.rmtree(run, ignore_errors=True)
        words = [SCRIPTS[stop.training], "--config", self.configs[stop.training]]
        words += [f"run.{key}={value}" for key, value in RUN.items()]
        if stop.signal == "none":
            finished = start([*words, f"run.steps={stop.step}"])
        else:
            finished = python_here().complete(str(STOPPER), stop.signal, str(stop.step), *words)
        expected = -9 if stop.signal == "SIGKILL" else 0
        assert finished.returncode == expected, finished.stdout + finished.stderr
        if stop.damage:
            damaged = max((run / "checkpoints").glob("step_???????")) / "rank_00000.safetensors"
            damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
        return run

    def denoiser_step(self, *words: str) -> str:
        """Train a denoiser for one step; returns what it prints."""
        run = self.folder / "runs" / "next"
        shutil.rmtree(run, ignore_errors=True)
        finished = start(["ldm/train.py", "--config", self.configs["dit"], "run.name=next", "run.steps=1", *words])
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout


class Newest(NamedTuple):
    """The newest valid checkpoint of a run, found without the code under test."""

    step: int
    averages: Mapping[str, Tensor]  # flattened

    @classmethod
    def of(cls, run: Path) -> Newest:
        valid = [path for path in (run / "checkpoints").glob("step_???????") if fault(path) is None]
        path = max(valid)
        with Fragments(path) as fragments:
            sizes = fragments.sizes("ema")
            return cls(int(path.name[5:]), {name: fragments.read(f"ema/{name}", 0, n) for name, n in sizes.items()})

    def check(self, weights: Mapping[str, Tensor]) -> None:
        assert weights.keys() >= self.averages.keys()
        for name, average in self.averages.items():
            assert torch.equal(weights[name].flatten(), average), name


def check_readers(workshop: Workshop, stop: Stop, *, train_on: bool = True) -> int:
    """Stop a training, and check that whoever reads the run reads its newest valid checkpoint, and that one line says
    its step. Returns the step. train_on: also begin another training with what this one has trained."""
    run = workshop.stopped(stop)
    before = contents(run)
    newest = Newest.of(run)
    steps = stop.step if stop.signal == "none" else STEPS
    words = f"averaged weights of step {newest.step} of {steps}"
    {"vae": check_vae, "clip": check_text, "dit": check_denoiser}[stop.training](workshop, run, newest, words)
    if train_on:
        key, told = {
            "vae": ("vae", f"{run}: {words}"),
            "clip": ("text", f"{run}: {words}"),
            "dit": ("start", f"model.start: {words} of {run}"),
        }[stop.training]
        assert told in workshop.denoiser_step(f"model.{key}={run}")
    assert contents(run) == before, "a reader has written into the run"
    return newest.step


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def check_vae(_: Workshop, run: Path, newest: Newest, words: str) -> None:
    told: list[str] = []
    vae = read_vae(run, dtype=torch.float32, in_place_of=None, report=told.append)
    assert told == [words]
    newest.check(vae.state_dict())
    assert vae.config.latent_std is not None and all(0 < std < 100 for std in vae.config.latent_std)


def check_text(_: Workshop, run: Path, newest: Newest, words: str) -> None:
    told: list[str] = []
    (tower,) = read_text(run, dtype=torch.float32, report=told.append)
    assert told == [words]
    mine = flattened(open_clip_to_transformers(newest.averages))
    Newest(newest.step, mine).check(tower.encoder.model.state_dict())  # pyright: ignore[reportAttributeAccessIssue]


def check_denoiser(workshop: Workshop, run: Path, newest: Newest, words: str) -> None:
    for path in (run, run / "model"):
        pipe = TextToImage.load(path, device="cpu", dtype="fp32")
        newest.check(pipe.denoiser.state_dict())
        assert pipe.description.count(words) == 1
    target = workshop.folder / "exported"
    shutil.rmtree(target, ignore_errors=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert run_command(export, arguments(), [str(run), str(target)]) == 0
    assert printed.getvalue().count(words) == 1
    newest.check(TextToImage.load(target, device="cpu", dtype="fp32").denoiser.state_dict())
    card = (target / "README.md").read_text()
    assert f"| steps | {newest.step} of 8 pictures: {8 * newest.step:,} pictures seen |" in card
    drawn = (run / "samples" / f"step_{newest.step:07d}.png").exists()
    assert ("Drawn at" in card) == drawn == (target / "assets/samples.png").exists()
    assert ("at which it was not measured" in card) == (not drawn)
