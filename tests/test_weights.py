"""The model that is shipped: that it is whole, small, opens elsewhere, draws, and listens to its text."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data.loader import CaptionedImages, DataConfig
from ldm import DrawRequest, TextToImage
from ldm.diffusion import RectifiedFlowPath, sample_randomness
from ldm.inference.img2img import canvas

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "weights" / "emoji64"
PROMPT = "a twemoji emoji of red apple"


def request(**settings: Any) -> DrawRequest:
    return DrawRequest(**{"prompt": PROMPT, "scale": 5.0, "sampler": "dpmpp_2m"} | settings)


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    return TextToImage.load(WEIGHTS)


def test_it_takes_at_most_40_megabytes():
    sizes = [path.stat().st_size for path in WEIGHTS.rglob("*.safetensors")]
    assert len(sizes) == 3
    assert sum(sizes) <= 40e6


def test_it_holds_no_code_and_no_pickle():
    texts = ("LICENSE", "NOTICE")
    suffixes = {path.suffix for path in WEIGHTS.rglob("*") if path.is_file() and path.name not in texts}
    assert suffixes <= {".safetensors", ".json", ".txt", ".yaml", ".md"}


def test_a_red_apple_is_red_and_the_sheet_around_it_white(pipe):
    picture = (pipe.pixels(*(request(seed=seed, steps=20) for seed in range(2))) + 1) / 2
    assert (picture[:, :, [0, 0, -1, -1], [0, -1, 0, -1]] > 0.9).float().mean() > 0.9
    middle = picture[:, :, 20:52, 16:48].mean(dim=(0, 2, 3))
    assert middle[0] > middle[1] + 0.15
    assert middle[0] > middle[2] + 0.15


def test_a_picture_does_not_depend_on_its_batch(pipe):
    requests = [request(seed=4 + i, steps=10) for i in range(3)]
    together = pipe.pixels(*requests)
    for i in range(3):
        assert (together[i] - pipe.pixels(requests[i])[0]).abs().max() <= 1e-4


def test_captions_that_are_swapped_raise_the_loss(pipe):
    model = pipe.model
    config = DataConfig(shards=(str(ROOT / "data/emoji64/train/00000.tar.gz"),), lanes=1, captions="best")
    batch = next(CaptionedImages(config, seed=0).once(64))
    with torch.no_grad():
        x0 = model.vae.encode(batch.pixels).mean
        eps, t = sample_randomness(0, range(64), x0.shape[1:]).eps, torch.full((64,), 0.8)
        found = [
            model.losses(pipe.denoiser, x0, eps, t, model.conditioner(captions)).error.mean().item()
            for captions in (batch.captions, batch.captions[1:] + batch.captions[:1])
        ]
    assert found[1] > 1.1 * found[0]


def test_latents_of_the_training_pictures_have_unit_variance(pipe):
    config = DataConfig(shards=(str(ROOT / "data/emoji64/train/*.tar.gz"),), lanes=1)
    batches = CaptionedImages(config, seed=0).once(256)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        posteriors = [pipe.model.vae.encode(next(batches).pixels) for _ in range(4)]
        latents = torch.cat([q.sample(torch.randn(q.mean.shape, generator=noise)) for q in posteriors])
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.1
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.1


def test_the_autoencoder_reaches_28_decibels(pipe):
    from vae.losses import psnr

    config = DataConfig(shards=(str(ROOT / "data/emoji64/val/*.tar.gz"),), lanes=1)
    batch = next(CaptionedImages(config, seed=0).once(96))
    with torch.no_grad():
        decibels = psnr(pipe.model.decode(pipe.model.vae.encode(batch.pixels).mean), batch.pixels)
    assert decibels.mean() >= 28


def test_inpainting_keeps_what_is_black_and_paints_what_is_white(pipe):
    (begun,) = pipe("a noto emoji of Santa Claus, medium skin tone", seed=7, steps=10)
    mask = Image.new("L", begun.size, "black")
    mask.paste("white", (0, 0, 64, 32))
    begun_with = canvas(begun, mask, 1.0, size=(64, 64)).pixels
    prompt = "a noto emoji of woman, medium skin tone, red hair"
    drawn = pipe.pixels(request(prompt=prompt, image=begun, mask=mask, seed=1, steps=10))
    change = (drawn - begun_with).abs().mean(dim=(0, 1, 3))  # a row
    assert change[32:].max() == 0  # the picture itself
    assert change[:28].mean() > 0.24


def test_diffusers_draws_the_same_picture_offline(pipe, monkeypatch):
    """On its own times: diffusers' grid for flows starts at 0.999, not 1, and tells the network whole thousandths."""
    from diffusers import DiffusionPipeline

    theirs: Any = DiffusionPipeline.from_pretrained(WEIGHTS, local_files_only=True, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        PROMPT, num_inference_steps=8, guidance_scale=5.0, height=64, width=64, max_sequence_length=32,
        use_resolution_binning=False, clean_caption=False, output_type="np",
        generator=[torch.Generator().manual_seed(7)],
    ).images[0]  # fmt: skip
    times = theirs.scheduler.sigmas.double()
    monkeypatch.setattr("ldm.inference.course.time_grid", lambda path, steps, grid: times)
    monkeypatch.setattr("ldm.model.latent_diffusion.prior_std", lambda path, start: 1.0)
    monkeypatch.setattr(RectifiedFlowPath, "timesteps", lambda self, t: (1000 * t).floor())
    found = pipe.pixels(request(seed=7, steps=8))[0]
    found = (found.clamp(-1, 1) + 1).permute(1, 2, 0).numpy() / 2
    assert expected.std() > 0.1 and np.abs(found - expected).max() <= 1e-4


def test_diffusers_draws_with_it_offline_as_the_documentation_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "interchange.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "diffusers" in block]
    scope: dict[str, Any] = {}
    exec(code.replace("num_inference_steps=30", "num_inference_steps=12"), scope)
    picture = torch.from_numpy(np.array(scope["image"])).float() / 255
    assert picture.shape == (64, 64, 3)
    red = picture[20:52, 16:48].mean(dim=(0, 1))
    assert red[0] > red[1] + 0.15 and red[0] > red[2] + 0.15


def test_the_weights_tell_their_sources_and_carry_their_licence():
    """A folder is passed on without the repository around it."""
    for name in ("LICENSE", "NOTICE"):
        assert (WEIGHTS / name).read_bytes() == (ROOT / name).read_bytes()
    card = (WEIGHTS / "README.md").read_text(encoding="utf-8")
    assert "\nlicense: apache-2.0\n" in card and all(
        source in card for source in ("Noto Emoji", "Twemoji", "CC-BY 4.0")
    )
    for word in ("began with", "320,000 pictures seen", "64 x 64"):
        assert word in card
