"""A model's own folder draws the picture that diffusers draws from it, when neither sampler nor time grid is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from helpers.both_pipelines import our_pipeline, their_pipeline
from helpers.published import SCHEDULERS
from helpers.stable_diffusion import stable_diffusion
from PIL import Image

from ldm import DrawOptions, DrawRequest, TextToImage
from ldm.interop.diffusers_layout.folder import write_folder
from ldm.interop.read_model import read_facts

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
        (folder / "foundry.yaml").unlink()  # which stock folders do not have
        return folder

    return lambda model, kind=None, **values: made(model, kind, json.dumps(values))


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
@pytest.mark.parametrize(("model", "steps"), [("sd15", 7), ("sd21", 10)])
def test_every_class_from_the_published_values(folder_of, model, kind, steps):
    folder = folder_of(model, kind)
    assert_same(ours(folder, steps), theirs(folder, steps))


def test_a_table_of_its_own(folder_of):
    betas = (np.linspace(0.03, 0.11, 1000) ** 2).astype(np.float32).tolist()
    folder = folder_of("sd15", "PNDMScheduler", trained_betas=betas)
    assert_same(ours(folder, 7), theirs(folder, 7))
    path = our_pipeline(folder).model.path
    again = folder.parent / "again"
    our_pipeline(folder).save(again)
    assert TextToImage.load(again, device="cpu").model.path == path


def test_pixart(folder_of):
    folder = folder_of("pixart")
    settings = {"max_sequence_length": 77, "use_resolution_binning": False, "clean_caption": False}
    assert_same(ours(folder, 7), theirs(folder, 7, **settings))


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_eta_of_ddim(folder_of, eta):
    folder = folder_of("sd15", "DDIMScheduler")
    assert_same(ours(folder, 7, options=DrawOptions(eta=eta)), theirs(folder, 7, eta=eta))


def picture(*, mode: str = "RGB") -> Image.Image:
    """Something to begin with; as a mask its left half is black."""
    if mode == "L":
        return Image.fromarray(np.repeat([[0] * 16 + [255] * 16], 32, 0).astype(np.uint8))
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((32, 32), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("kind", CLASSES)
def test_from_a_picture(folder_of, kind):
    folder = folder_of("sd15", kind)
    for strength in (0.3, 0.8):
        expected = theirs(folder, 7, StableDiffusionImg2ImgPipeline, image=picture(), strength=strength)
        assert_same(ours(folder, 7, image=picture(), strength=strength), expected)


def assert_painted_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The right half is drawn as there; the left half is the picture itself, which diffusers sends through the
    autoencoder."""
    assert_same(found[..., 16:], expected[..., 16:])
    assert_same(found[..., :16], torch.from_numpy(np.asarray(picture()) / 255).permute(2, 0, 1)[..., :16])


# In the middle of a step of DPM2 diffusers blends the kept half at the level of the step's end: that is not followed.
BLENDED = [kind for kind in CLASSES if not kind.startswith("KDPM2")]


@pytest.mark.parametrize("kind", BLENDED)
def test_repainting(folder_of, kind):
    folder = folder_of("sd15", kind)
    for strength in (0.7, 1.0):
        canvas = {"image": picture(), "strength": strength}
        expected = theirs(
            folder, 7, StableDiffusionInpaintPipeline, mask_image=picture(mode="L"), height=32, width=32, **canvas
        )
        assert_painted_same(ours(folder, 7, mask=picture(mode="L"), **canvas), expected)


def test_a_network_for_inpainting(folder_of):
    folder = folder_of("sd15-inpainting")
    canvas = {"image": picture(), "strength": 1.0}
    expected = theirs(
        folder, 7, StableDiffusionInpaintPipeline, mask_image=picture(mode="L"), height=32, width=32, **canvas
    )
    assert_painted_same(ours(folder, 7, mask=picture(mode="L"), **canvas), expected)


@pytest.mark.parametrize(
    ("model", "kind", "values"),
    [
        ("sd15", None, {}),
        ("sd21", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("sd15", "UniPCMultistepScheduler", {"disable_corrector": [0]}),
    ],
)
def test_what_it_states_survives_export(folder_of, tmp_path, model, kind, values):
    """Folder to folder, and through a single file: here and in diffusers the same picture, and the same class."""
    folder = folder_of(model, kind, **values)
    expected = ours(folder, 6)
    pipe = our_pipeline(folder)
    pipe.save(tmp_path / "copy")
    pipe.save(tmp_path / "one.safetensors", format="single-file")
    TextToImage.load(tmp_path / "one.safetensors", device="cpu").save(tmp_path / "back")
    for place in ("copy", "one.safetensors", "back"):
        again = TextToImage.load(tmp_path / place, device="cpu")
        assert again.parts.scheduler == pipe.parts.scheduler
        assert torch.equal(ours_of(again, 6), expected)
    assert_same(theirs(tmp_path / "back", 6), expected)


def ours_of(pipe: TextToImage, steps: int, **settings: Any) -> torch.Tensor:
    request = DrawRequest(**{"prompt": PROMPT, "steps": steps, "scale": 7.5, "seed": SEED} | settings)
    return (pipe.pixels(request)[0].clamp(-1, 1) + 1) / 2


def test_a_name_is_followed_before_the_folder(folder_of):
    """A named sampler is on our own grid, a named grid is for dpmpp_2m, and "stock" is the default by name."""
    folder = folder_of("sd15")
    own = ours(folder, 6)
    assert torch.equal(ours(folder, 6, sampler="stock"), own)
    plain = ours(folder, 6, sampler="dpmpp_2m", options=DrawOptions(time_grid="trailing"))
    assert torch.equal(ours(folder, 6, sampler="dpmpp_2m"), plain) and not torch.equal(plain, own)
    assert torch.equal(ours(folder, 6, options=DrawOptions(time_grid="trailing")), plain)


def test_the_record_says_what_was_followed(folder_of):
    request = DrawRequest(prompt=PROMPT, steps=2, seed=SEED)
    (drawn,) = our_pipeline(folder_of("sd15")).draw(request)
    assert drawn.recipe.sampler == "stock"
    assert drawn.recipe.scheduler == "PNDMScheduler, leading, steps_offset 1, skip_prk_steps True"
    from ldm.inference.recipe import parameters_text

    text = parameters_text(drawn.recipe)
    assert "Sampler: PLMS" in text and "Schedule type: DDIM" in text
    again = DrawRequest(prompt=PROMPT, steps=2, seed=SEED, sampler=drawn.recipe.sampler)
    assert again.check(our_pipeline(folder_of("sd15")).facts).sampler == "stock"


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    import shutil

    shutil.copytree(folder, target)
    file = target / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    kind = changes.get("_class_name")
    if kind:
        index = json.loads((target / "model_index.json").read_text())
        (target / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", kind]}))
    return target


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"_class_name": "DPMSolverSDEScheduler"}, "the scheduler 'DPMSolverSDEScheduler' is not followed"),
        ({"_class_name": "x" * 400}, "x..."),
        ({"_class_name": "DDIMScheduler", "timestep_spacing": "random"}, "timestep_spacing 'random' of the scheduler"),
        ({"_class_name": "DDIMScheduler", "steps_offset": 1.5, "clip_sample": 7}, ""),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 9}, "solver_order 9 of the scheduler"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": True}, "solver_order True of the scheduler"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_p": {"x": 1}}, "solver_p"),
        ({"_class_name": "UniPCMultistepScheduler", "disable_corrector": ["x"]}, "disable_corrector"),
        ({"_class_name": "UniPCMultistepScheduler", "lower_order_final": False}, "has no last step"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "has no last step"),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True},
            "more than one",
        ),
        ({"_class_name": "PNDMScheduler", "prediction_type": "sample"}, "predicts x0"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, "variance_type 'learned_range'"),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous", "prediction_type": "v_prediction"},
            "timestep_type continuous",
        ),
    ],
)
def test_what_cannot_be_followed_is_one_warning_and_in_the_record(folder_of, tmp_path, changes, told):
    folder = edited(folder_of("sd15"), tmp_path / "m", **changes)
    if not told:  # what the pipeline for Stable Diffusion replaces anyway
        assert TextToImage.load(folder, device="cpu").parts.scheduler is not None
        return
    with pytest.warns(UserWarning, match="drawn with dpmpp_2m on the grid trailing") as warned:
        pipe = TextToImage.load(folder, device="cpu", dtype="fp32")
    assert len(warned) == 1 and told in str(warned[0].message) and str(folder) in str(warned[0].message)
    (drawn,) = pipe.draw(DrawRequest(prompt=PROMPT, steps=2, seed=SEED))
    assert drawn.recipe.sampler == "dpmpp_2m"
    assert drawn.recipe.scheduler.startswith("not followed: ") and told in drawn.recipe.scheduler


def test_our_own_export_is_drawn_as_before(tmp_path):
    write_folder(stable_diffusion(1), tmp_path / "m", dtype=torch.float32)
    assert read_facts(tmp_path / "m").scheduler is None
    pipe = TextToImage.load(tmp_path / "m", device="cpu")
    named = ours_of(pipe, 5, sampler="dpmpp_2m", options=DrawOptions(time_grid="trailing"))
    assert torch.equal(ours_of(pipe, 5), named)
    (drawn,) = pipe.draw(DrawRequest(prompt=PROMPT, steps=2, seed=SEED))
    assert (drawn.recipe.sampler, drawn.recipe.scheduler) == ("dpmpp_2m", "")


@pytest.mark.parametrize(
    ("kind", "values", "settings", "told"),
    [
        ("LCMScheduler", {}, {"steps": 51}, "expected at most 50, the steps that this LCM was distilled on"),
        ("PNDMScheduler", {"skip_prk_steps": False}, {"steps": 3}, "expected at least 4"),
        ("DDIMScheduler", {}, {"steps": 1000}, "DDIMScheduler with 1000 steps evaluates at timestep 1000 of 1000"),
        ("PNDMScheduler", {}, {"steps": 4, "options": DrawOptions(eta=0.5)}, "PNDMScheduler has no eta"),
    ],
)
def test_a_request_that_it_cannot_draw_is_named_and_a_named_sampler_helps(folder_of, kind, values, settings, told):
    facts = read_facts(folder_of("sd15", kind, **values))
    with pytest.raises(ValueError, match=told):
        DrawRequest(prompt=PROMPT, **settings).check(facts)
    DrawRequest(prompt=PROMPT, **{"sampler": "ddim"} | settings).check(facts)


def test_progress_counts_the_steps(folder_of):
    for kind in ("PNDMScheduler", "HeunDiscreteScheduler", "DDIMScheduler"):
        calls: list[tuple[int, int]] = []
        pipe = our_pipeline(folder_of("sd15", kind))
        pipe("x", steps=5, progress=lambda *call, calls=calls: calls.append(call))
        assert calls == [(done, 5) for done in range(1, 6)]
