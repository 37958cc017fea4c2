"""A command, read from top to bottom: how often it goes from one floor of the house up to a higher one.

Imports only go down, so what goes up was handed down before: a function that is called for each step, an object. Each
such pair of modules is a place where a reader must go back. Two are enough.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.forking import ROOT, python_here
from helpers.launching import DIT, denoiser_config
from helpers.walking import Calls
from test_structure import place

WEIGHTS = ROOT / "weights" / "emoji64"


def climbs(tmp_path: Path, *words: str) -> dict[tuple[str, str], str]:
    """Pairs of a module and one on a higher floor that it calls into, and the function that is called.

    The command's own main is not one, nor is a configuration that checks itself as it is made from YAML.
    """
    out = tmp_path / "calls.json"
    finished = python_here().complete(str(ROOT / "tests/helpers/walking.py"), str(out), *words)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    calls = {(caller, callee): function for caller, callee, function in json.loads(out.read_text())}
    assert ("ldm.cli", words[0].removesuffix(".py").replace("/", ".")) in calls
    return {
        (caller, callee): function
        for (caller, callee), function in calls.items()
        if place(callee)[0] < place(caller)[0] and caller not in ("ldm.cli", "ldm.config")
    }


def test_a_drawing_goes_up_twice(tmp_path: Path):
    """For each step of the sampler, and to show the progress."""
    words = ["--prompt", "a red apple", "--steps", "2", "--n-samples", "1", "--outdir", str(tmp_path)]
    assert climbs(tmp_path, "txt2img.py", "--ckpt", str(WEIGHTS), *words) == {
        ("ldm.samplers.multistep", "ldm.inference.progress"): "Reporter.watching.<locals>.watching",
        ("ldm.inference.many", "txt2img"): "draw_and_save.<locals>.<lambda>",
    }


def test_a_training_goes_up_once(tmp_path: Path, few_emoji: str):
    """For the network that is trained, which DeepSpeed has wrapped."""
    config = denoiser_config(tmp_path, "dit", few_emoji, DIT, vae=str(WEIGHTS), text=str(WEIGHTS))
    words = ["run.steps=2", "run.sample_every=2", "run.checkpoint_every=2"]
    assert climbs(tmp_path, "ldm/train.py", "--config", config, *words) == {
        ("ldm.model.latent_diffusion", "ldm.training.engine.engine"): "Engine.__call__",
    }


@pytest.mark.parametrize("between", [False, True])
def test_a_call_is_seen_also_through_other_code(between: bool):
    calls = Calls()
    names = {"above.py": "vae.above", "below.py": "ldm.below"}
    calls.module = lambda frame: names.get(frame.f_code.co_filename)
    functions: dict[str, object] = {}
    exec(compile("def callee(_): pass", "above.py", "exec"), functions)
    call = "def caller(): list(map(callee, [0]))" if not between else "def caller(): other(callee)"
    exec(compile("def other(function): function(0)", "elsewhere.py", "exec"), functions)
    exec(compile(call, "below.py", "exec"), functions)
    sys.setprofile(calls.record)
    try:
        functions["caller"]()  # pyright: ignore[reportCallIssue]
    finally:
        sys.setprofile(None)
    assert calls.pairs == {("ldm.below", "vae.above"): "callee"}
