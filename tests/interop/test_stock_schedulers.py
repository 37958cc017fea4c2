"""A model's own folder draws the picture that diffusers draws from it, when neither sampler nor time grid is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.published import SCHEDULERS
from helpers.stable_diffusion import stable_diffusion

from ldm import DrawRequest, TextToImage
from ldm.interop.diffusers_layout.folder import write_folder

PROMPT, SEED = "a noto emoji of a red apple", 11
CLASSES = {
    "PNDMScheduler": {},
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "LMSDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {},
    "DPMSolverSinglestepScheduler": {},
    "DEISMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "LCMScheduler": {},
}
# The same model as a folder of 1.5's shape and of 2.1's, both with the published scheduler.
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "sd15": ({"version": 1}, "1.5"),
    "sd21": ({"version": 2, "prediction": "v"}, "2.1"),
    "sd15-inpainting": ({"version": 1, "inpainting": True}, "1.5-inpainting"),
    "pixart": ({"version": 1, "transformer": True}, "pixart-alpha"),
}
Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Makes a folder with these values in its scheduler's file, as the class writes them."""
    root = tmp_path_factory.mktemp("stock")

    @cache
    def made(model: str, kind: str | None = None, values: str = "{}") -> Path:
        folder = root / f"{model}-{kind}-{abs(hash(values))}"
        parts, published = MODELS[model]
        write_folder(stable_diffusion(**parts), folder, dtype=torch.float32)
        content = SCHEDULERS[published] | json.loads(values)
        if kind is not None:
            scheduler = getattr(diffusers, kind).from_config(content)
            scheduler.save_pretrained(folder / "scheduler")
        else:
            (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(content))
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", kind or content["_class_name"]]
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return lambda model, kind=None, **values: made(model, kind, json.dumps(values))


@cache
def their_pipeline(folder: Path, loader: Any) -> Any:
    diffusers.utils.logging.set_verbosity_error()
    pipe = loader.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def our_pipeline(folder: Path) -> TextToImage:
    return TextToImage.load(folder, device="cpu", dtype="fp32")


def theirs(folder: Path, steps: int, loader: Any = DiffusionPipeline, **call: Any) -> torch.Tensor:
    """3 x H x W in 0..1, by the folder's own scheduler."""
    call = {"guidance_scale": 7.5, "generator": [torch.Generator().manual_seed(SEED)], "output_type": "np"} | call
    if loader is DiffusionPipeline:
        call |= {"height": 32, "width": 32}
    picture = their_pipeline(folder, loader)(PROMPT, num_inference_steps=steps, **call).images[0]
    return torch.from_numpy(picture).permute(2, 0, 1)


def ours(folder: Path, steps: int, **settings: Any) -> torch.Tensor:
    request = DrawRequest(**{"prompt": PROMPT, "steps": steps, "scale": 7.5, "seed": SEED} | settings)
    return (our_pipeline(folder).pixels(request)[0].clamp(-1, 1) + 1) / 2


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.01  # not a blank sheet
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("model", ["sd15", "sd21"])
@pytest.mark.parametrize("steps", [5, 7, 20, 30, 50])
def test_the_published_folder_as_it_is(folder_of, model, steps):
    folder = folder_of(model)
    assert_same(ours(folder, steps), theirs(folder, steps))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize(("model", "steps"), [("sd15", 5), ("sd15", 30), ("sd21", 7), ("sd21", 20), ("sd21", 50)])
def test_every_class_from_the_published_values(folder_of, model, kind, steps):
    folder = folder_of(model, kind)
    assert_same(ours(folder, steps), theirs(folder, steps))
