"""What a model card shows is code that runs as it stands, in diffusers and here, and draws a picture."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.stable_diffusion import stable_diffusion
from PIL import Image

from ldm.diffusion import EDMPath, RectifiedFlowPath
from ldm.interop.diffusers_layout.denoiser import OWN
from ldm.interop.diffusers_layout.folder import write_folder
from ldm.interop.model_card import CARD, model_card
from ldm.model.components import ModelComponents

MODELS: dict[str, dict[str, Any]] = {
    "dit": {"transformer": True},
    "dit on rectified flow": {"transformer": True, "path": RectifiedFlowPath(), "prediction": "velocity"},
    "dit on EDM's path": {"transformer": True, "path": EDMPath(sigma_data=1.0), "prediction": "edm"},
    "sd1": {"version": 1},
    "sd2-v": {"version": 2, "prediction": "v"},
    "inpainting": {"version": 1, "inpainting": True},
}


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes a model with its card, next to the pictures that the card of one for inpainting opens; returns the card's
    pieces of code, with fewer steps."""
    Image.effect_noise((32, 32), 60).convert("RGB").save(tmp_path / "photo.png")
    Image.new("L", (32, 32), 255).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)

    def export(parts: ModelComponents) -> tuple[str, list[str]]:
        card = model_card(parts, name="my-model")
        write_folder(parts, tmp_path / "my-model", dtype=torch.float32, beside={CARD: card.encode()})
        few = re.sub(r"steps=30", "steps=2", (tmp_path / "my-model" / CARD).read_text())
        return few, re.findall(r"```python\n(.*?)```", few, re.DOTALL)

    return export


@pytest.mark.parametrize("name", MODELS)
def test_its_code_draws_in_diffusers_and_here(name, exported):
    _, pieces = exported(stable_diffusion(**MODELS[name]))
    assert ["diffusers" in piece for piece in pieces] == [True, False]
    in_diffusers, here = ({}, {})
    exec(pieces[0], in_diffusers)
    exec(pieces[1], here)
    assert in_diffusers["image"].size == (32, 32)
    assert [image.size for image in here["images"]] == [(32, 32)] * 4


def test_its_command_draws_too(exported, tmp_path):
    card, _ = exported(stable_diffusion(1, inpainting=True))
    (line,) = re.findall(r"`python (txt2img\.py .*?)`", card)
    root = Path(__file__).parents[2]
    words = [sys.executable, *shlex.split(line.replace("txt2img.py", str(root / "txt2img.py"))), "--steps", "1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.png")) > [tmp_path / "mask.png", tmp_path / "photo.png"]


def test_a_dit_does_not_draw_without_the_arguments_and_the_card_says_so(exported):
    card, _ = exported(stable_diffusion(transformer=True))
    assert 'it ends with "Invalid sample size"' in card
    pipe: Any = DiffusionPipeline.from_pretrained("my-model")
    with pytest.raises(ValueError, match="Invalid sample size"):
        pipe("A frog.")
    assert "Invalid sample size" not in model_card(stable_diffusion(1), name="x")


def test_the_card_of_a_layout_of_our_own_does_not_speak_of_diffusers(monkeypatch):
    monkeypatch.setattr("ldm.interop.model_card.layout_of", lambda _: OWN)
    card = model_card(stable_diffusion(transformer=True), name="x")
    assert "diffusers" not in card and "library_name: latent-foundry" in card and "TextToImage.load" in card
