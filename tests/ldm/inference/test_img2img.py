"""Pictures to begin with and masks: what is kept, what is drawn anew, and what is refused."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.analytic import generators
from helpers.stable_diffusion import stable_diffusion
from PIL import Image

from ldm.diffusion import EDMPath, RectifiedFlowPath, ScaledLinearBetaPath, noise_sample
from ldm.inference.img2img import Start, begin, canvas, keeping, remaining
from ldm.inference.pictures import read_picture
from ldm.inference.pipeline import TextToImage
from ldm.inference.request import DrawRequest
from ldm.samplers import SAMPLERS, time_grid

DETERMINISTIC = [name for name, sampler in SAMPLERS.items() if not sampler.stochastic]


def photo(width: int = 32, height: int = 32) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def half_mask(width: int = 32, height: int = 32) -> Image.Image:
    """Black at the left, white at the right."""
    return Image.fromarray(np.repeat([[0] * (width // 2) + [255] * (width // 2)], height, 0).astype(np.uint8))


@pytest.fixture(scope="module")
def pipe() -> TextToImage:
    return TextToImage(stable_diffusion(1), name="tiny", weights_hash="0")


def draw(pipe: TextToImage, **change) -> torch.Tensor:
    settings = {"prompt": "a red apple", "steps": 6, "scale": 2.0, "sampler": "ddim", "seed": 3}
    n = change.pop("n", 1)
    first = DrawRequest(**settings | change)
    return pipe.pixels(*(replace(first, seed=first.seed + i) for i in range(n)))


def test_a_canvas_is_pixels_from_minus_one_to_one_and_a_mask_of_zeros_and_ones():
    image = Image.fromarray(np.array([[[0, 128, 255]]], dtype=np.uint8))
    mask = Image.fromarray(np.array([[127, 128]], dtype=np.uint8))
    found = canvas(image, mask, 1.0, size=(1, 1))
    assert found.pixels.flatten().tolist() == pytest.approx([-1, 128 / 127.5 - 1, 1], abs=1e-6)
    wide = canvas(image, mask, 1.0, size=(1, 2))
    assert wide.mask is not None and wide.mask.tolist() == [[[[0, 1]]]]
    assert (DrawRequest(image=image, mask=mask).usual_strength, DrawRequest(image=image).usual_strength) == (1.0, 0.75)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_pictures_of_all_kinds_of_colour_are_taken(mode):
    image = Image.new(mode, (8, 8)) if mode == "I;16" else photo(8, 8).convert(mode)
    assert canvas(image, image, 0.5, size=(8, 8)).pixels.shape == (1, 3, 8, 8)


def test_sixteen_bits_are_scaled_and_what_is_transparent_is_white():
    grey = Image.fromarray(np.array([[300, 30_000, 65_000]], dtype=np.uint16))
    found = canvas(grey, grey, 1.0, size=(1, 3))
    assert found.mask is not None and found.mask.flatten().tolist() == [0, 0, 1]
    assert found.pixels[0, 0, 0].tolist() == pytest.approx([1 / 127.5 - 1, 117 / 127.5 - 1, 253 / 127.5 - 1], abs=1e-5)
    clear = canvas(Image.new("RGBA", (1, 1), (0, 0, 0, 0)), None, 0.75, size=(1, 1))
    assert clear.pixels.flatten().tolist() == [1, 1, 1]


@pytest.mark.parametrize(("strength", "left"), [(1.0, 10), (0.75, 7), (0.35, 3), (0.1, 1)])
def test_the_last_steps_remain(strength, left):
    times = time_grid(ScaledLinearBetaPath(), 10)
    assert torch.equal(remaining(times, strength), times[10 - left :])


def test_no_step_at_all_is_refused():
    with pytest.raises(ValueError, match="strength 0.05 leaves none of 10 steps"):
        remaining(time_grid(ScaledLinearBetaPath(), 10), 0.05)


@pytest.mark.parametrize("path", [ScaledLinearBetaPath(), RectifiedFlowPath(), EDMPath()], ids=lambda path: path.kind)
def test_the_beginning_is_the_picture_in_noise(path):
    """x - alpha z = sigma n: with the autoencoder's own deviation taken away, what is left has variance sigma^2."""
    model = stable_diffusion(1, path=path).model
    times = remaining(time_grid(path, 10), 0.5)
    found = begin(model, canvas(photo(), None, 0.5, size=(32, 32)), generators(*range(64)), times, for_inpainting=False)
    with torch.no_grad():
        mean = model.vae.encode(canvas(photo(), None, 0.5, size=(32, 32)).pixels).mean
        std = torch.exp(0.5 * model.vae.encode(canvas(photo(), None, 0.5, size=(32, 32)).pixels).logvar)
    alpha, sigma = path.alpha(times[0]), path.sigma(times[0])
    expected = (sigma**2 + (alpha * std) ** 2).sqrt()
    scores = (found.x - alpha * mean) / expected
    assert scores.mean().abs() < 0.02 and scores.std().item() == pytest.approx(1, abs=0.02)
    assert found.mask is None and found.concat is None


@pytest.mark.parametrize("sampler", DETERMINISTIC)
@pytest.mark.parametrize("path", [ScaledLinearBetaPath(), RectifiedFlowPath()], ids=lambda path: path.kind)
def test_what_is_kept_runs_along_the_picture_in_its_noise(sampler, path):
    """The denoiser sees alpha z + sigma n there at every time, and at the end z itself is left."""
    clean, noise = torch.randn(2, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1
    times = remaining(time_grid(path, 8), 0.8)
    start = Start(x=noise_sample(clean, noise, path, times[0]), clean=clean, noise=noise, mask=mask)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((x_t, t))
        return torch.tanh(x_t)

    found = SAMPLERS[sampler].function(keeping(denoise, start, path, times), start.x, path, times, generators(1))
    kept = mask == 0
    for x_t, t in seen:
        expected = noise_sample(clean, noise, path, t)
        assert torch.allclose(x_t[..., :2], expected[..., :2], atol=1e-5)
    assert torch.allclose(found.masked_select(kept), clean.masked_select(kept), atol=1e-5)
    # The rest is drawn, and the same as if x_t had been put right by hand after each step.
    assert (found - clean)[..., 2:].abs().max() > 0.1


def test_where_all_is_noise_the_first_time_is_left_alone():
    path, times = ScaledLinearBetaPath(), time_grid(ScaledLinearBetaPath(), 4)
    clean, noise = torch.randn(2, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    start = Start(x=noise, clean=clean, noise=noise, mask=torch.zeros(1, 1, 4, 4), is_noise=True)
    seen: list[torch.Tensor] = []
    denoise = keeping(lambda x_t, t: seen.append(x_t) or x_t, start, path, times)
    denoise(noise, times[0])
    denoise(noise, times[1])
    assert torch.equal(seen[0], noise)
    assert torch.allclose(seen[1], noise_sample(clean, noise, path, times[1]))


@pytest.mark.parametrize("sampler", ["ddim", "euler_ancestral", "dpmpp_2m_sde", "ddpm"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_picture_is_the_same_alone_and_in_a_batch(pipe, sampler, strength):
    given = {"image": photo(), "mask": half_mask(), "strength": strength, "sampler": sampler}
    together = draw(pipe, n=3, **given)
    for i in range(3):
        alone = draw(pipe, seed=3 + i, **given)
        assert (together[i] - alone[0]).abs().max() <= 1e-4


def test_less_strength_stays_nearer_to_the_picture(pipe):
    pixels = canvas(photo(), None, 0.5, size=(32, 32)).pixels
    with torch.no_grad():
        reached = pipe.model.decode(pipe.model.vae.encode(pixels).mean)
    far = [
        (draw(pipe, image=photo(), strength=strength, steps=20) - reached).abs().mean() for strength in (0.05, 0.3, 1)
    ]
    assert far[0] < far[1] < far[2]


def test_the_pipeline_takes_pictures_and_gives_pictures(pipe):
    drawn = pipe("a red apple", image=photo(50, 41), strength=0.5, steps=4, n=2)
    assert [image.size for image in drawn] == [(48, 40), (48, 40)]
    assert pipe("x", image=photo(50, 41), mask=half_mask(), steps=4, width=32, height=64)[0].size == (32, 64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": half_mask()}, "a mask was given without an image"),
        ({"strength": 0.5}, "a strength was given without an image"),
        ({"image": photo(), "strength": 0.0}, "strength is 0.0, expected above 0"),
        ({"image": photo(), "strength": 1.5}, "strength is 1.5, expected above 0"),
        ({"image": photo(), "strength": float("nan")}, "strength is nan, expected above 0"),
        ({"image": photo(), "height": 30}, "height is 30, expected a multiple of 4"),
    ],
)
def test_what_cannot_be_begun_with_is_named(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe.draw(DrawRequest(**given))


@pytest.mark.parametrize(
    ("given", "message"),
    [({}, "give it an image and a mask"), ({"image": photo()}, "give a mask too, white where to paint")],
)
def test_weights_for_inpainting_need_a_mask(given, message):
    pipe = TextToImage(stable_diffusion(1, inpainting=True), name="tiny", weights_hash="0")
    with pytest.raises(ValueError, match=f"tiny is made for inpainting: {message}"):
        pipe("x", steps=2, **given)


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    photo(20, 10).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").size == (10, 20)


def too_large() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (12_000, 10_000)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.png cannot be used as a picture: it is empty"),
        (b"<svg/>", "cannot be used as a picture: it is SVG, which only a program can draw: convert it to PNG"),
        (b"GIF89a" + bytes(50), "cannot be used as a picture: it is no JPEG, PNG, WebP, GIF, "),
        (too_large(), "it has 12000 x 10000 pixels, expected at most"),
    ],
)
def test_what_is_no_picture_is_named(content, message, tmp_path: Path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_picture(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        read_picture(tmp_path)


@pytest.mark.parametrize(
    ("sampler", "steps", "evaluations"),
    [("dpm_fast", 14, {7}), ("restart", 44, {43}), ("dpm_adaptive", 10, range(6, 99))],
)
def test_samplers_with_times_of_their_own_take_the_range_that_is_left(pipe, sampler, steps, evaluations):
    seen: list[float] = []
    hook = pipe.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1].max().item()))
    found = draw(pipe, sampler=sampler, steps=steps, image=photo(), strength=0.5, scale=1.0)
    hook.remove()
    assert found.isfinite().all()
    first = time_grid(pipe.model.path, steps, SAMPLERS[sampler].own_grid)[steps // 2]
    assert len(seen) in evaluations and max(seen) == pytest.approx(pipe.model.path.timesteps(first).item(), abs=1e-3)
