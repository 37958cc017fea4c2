"""The same folder, seed, steps and scale give the same picture here and in diffusers' pipelines, whatever is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from helpers.both_pipelines import our_pipeline, their_pipeline
from helpers.stable_diffusion import stable_diffusion
from PIL import Image

from ldm import DrawRequest
from ldm.interop.diffusers_layout.folder import write_folder

PROMPT, SEED, STEPS = "a noto emoji of a red apple", 11, 8  # 8 divides 1000: else DDIM there steps beside its own grid
KINDS: dict[str, dict[str, Any]] = {
    "sd1": {"version": 1},
    "sd2_v": {"version": 2, "prediction": "v"},
    "sd2_eps": {"version": 2},
    "pixart": {"version": 1, "transformer": True},
    "sd1_inpainting": {"version": 1, "inpainting": True},
}


class EulerFromUnitNoise(EulerDiscreteScheduler):
    """Euler's method from the noise that all others begin with.

    On a trailing grid diffusers, after k-diffusion, begins with sigma n where those begin with n: the 0.2% by which
    alpha n is short of nothing at the last noise level. On a leading grid it does as here.
    """

    @property
    def init_noise_sigma(self) -> torch.Tensor:
        return (self.sigmas.max() ** 2 + 1) ** 0.5


SCHEDULERS = {
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "euler": (EulerFromUnitNoise, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "unipc_2": (UniPCMultistepScheduler, {"solver_type": "bh2"}),
}
SAMPLERS = pytest.mark.parametrize("sampler", SCHEDULERS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    for name, kind in KINDS.items():
        write_folder(stable_diffusion(**kind), root / name, dtype=torch.float32)
    return {name: root / name for name in KINDS}


def picture(*, mode: str = "RGB", size: tuple[int, int] = (32, 32), seed: int = 0) -> Image.Image:
    """Something to begin with; as a mask its left half is black."""
    width, height = size
    if mode == "L":
        return Image.fromarray(
            np.repeat([[0] * (width // 2) + [255] * (width - width // 2)], height, 0).astype(np.uint8)
        )
    values = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size, Image.Resampling.BICUBIC)


def theirs(folder: Path, sampler: str, loader: Any = DiffusionPipeline, **call: Any) -> torch.Tensor:
    """3 x H x W in 0..1."""
    pipe = their_pipeline(folder, loader)
    scheduler, settings = SCHEDULERS[sampler]
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    call = {
        "num_inference_steps": STEPS,
        "generator": [torch.Generator().manual_seed(SEED)],
        "output_type": "np",
    } | call
    return torch.from_numpy(pipe(PROMPT, **call).images[0]).permute(2, 0, 1)


def ours(folder: Path, sampler: str, *, canvas: dict[str, Any] | None = None, **call: Any) -> torch.Tensor:
    settings = {"prompt": PROMPT, "steps": STEPS, "sampler": sampler, "seed": SEED} | call | (canvas or {})
    return (our_pipeline(folder).pixels(DrawRequest(**settings))[0].clamp(-1, 1) + 1) / 2


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.01  # not a blank sheet
    assert (found - expected).abs().max() <= 1e-4


def assert_painted_same(found: torch.Tensor, expected: torch.Tensor, image: Image.Image) -> None:
    """The right half is drawn as there; the left half is the picture itself, which diffusers sends through the
    autoencoder."""
    half = found.shape[-1] // 2
    assert_same(found[..., half:], expected[..., half:])
    assert_same(found[..., :half], torch.from_numpy(np.asarray(image) / 255).permute(2, 0, 1)[..., :half])


@SAMPLERS
@pytest.mark.parametrize("kind", ["sd1", "sd2_v", "sd2_eps", "pixart"])
@pytest.mark.parametrize(("scale", "negative"), [(1.0, ""), (4.0, ""), (4.0, "a blue car")])
def test_text_to_image(folders, kind, sampler, scale, negative):
    extra: dict[str, Any] = {"height": 32, "width": 32, "guidance_scale": scale, "negative_prompt": negative}
    if kind == "pixart":
        extra |= {"max_sequence_length": 77, "use_resolution_binning": False, "clean_caption": False}
    expected = theirs(folders[kind], sampler, **extra)
    assert_same(ours(folders[kind], sampler, scale=scale, negative_prompt=negative), expected)


@SAMPLERS
@pytest.mark.parametrize("kind", ["sd1", "sd2_v", "sd2_eps"])
@pytest.mark.parametrize("strength", [0.3, 0.8, 1.0])
def test_image_to_image(folders, kind, sampler, strength):
    settings = {"image": picture(), "strength": strength}
    expected = theirs(
        folders[kind], sampler, StableDiffusionImg2ImgPipeline, guidance_scale=4.0, negative_prompt="blue", **settings
    )
    assert_same(ours(folders[kind], sampler, scale=4.0, negative_prompt="blue", canvas=settings), expected)


@SAMPLERS
@pytest.mark.parametrize("kind", ["sd1", "sd2_v", "sd1_inpainting"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting(folders, kind, sampler, strength):
    image, mask = picture(), picture(mode="L")
    expected = theirs(
        folders[kind], sampler, StableDiffusionInpaintPipeline,
        image=image, mask_image=mask, strength=strength, guidance_scale=4.0, height=32, width=32,
    )  # fmt: skip
    found = ours(folders[kind], sampler, scale=4.0, canvas={"image": image, "mask": mask, "strength": strength})
    assert_painted_same(found, expected, image)


def test_what_stock_eulers_start_and_ddims_grid_make_is_small(folders):
    """diffusers' own Euler from sigma n, and DDIM at 30 steps, which leaves its own grid: near, and not the same."""
    settings = {"height": 32, "width": 32, "guidance_scale": 1.0}
    for sampler, scheduler, steps in (("euler", EulerDiscreteScheduler, 8), ("ddim", DDIMScheduler, 30)):
        pipe = their_pipeline(folders["sd1"], DiffusionPipeline)
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **({"clip_sample": False} if steps == 30 else {}))
        generator = [torch.Generator().manual_seed(SEED)]
        expected = pipe(PROMPT, num_inference_steps=steps, generator=generator, output_type="np", **settings).images[0]
        found = ours(folders["sd1"], sampler, scale=1.0, steps=steps)
        assert 1e-4 < (found - torch.from_numpy(expected).permute(2, 0, 1)).abs().max() < 0.02


def test_a_picture_of_another_size_is_fitted_as_there(folders):
    image, mask = picture(size=(50, 41)), picture(mode="L", size=(50, 41))
    size = {"height": 40, "width": 48}
    expected = theirs(
        folders["sd1"], "ddim", StableDiffusionInpaintPipeline,
        image=image, mask_image=mask, strength=0.8, guidance_scale=1.0, **size,
    )  # fmt: skip
    found = ours(folders["sd1"], "ddim", scale=1.0, canvas={"image": image, "mask": mask, "strength": 0.8})
    assert found.shape == (3, 40, 48)
    assert_painted_same(found, expected, image.resize((48, 40), Image.Resampling.LANCZOS))
