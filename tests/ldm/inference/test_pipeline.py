"""Drawing with tiny random models: what a picture depends on, what diffusers draws, and what is refused."""

import math
import shutil
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from ldm import DrawOptions, DrawRequest, TextToImage
from ldm.denoisers import UNet, UNetConfig
from ldm.diffusion import RectifiedFlowPath
from ldm.interop.diffusers_layout.denoiser import save_denoiser
from ldm.model.components import LoadedDenoiser
from ldm.samplers import SAMPLERS
from text import TextEncoderConfig, TransformersTextEncoder, save_text_encoder

PROMPT = "a noto emoji of a red apple"


def draw(pipe, **changes):
    n, progress = changes.pop("n", 1), changes.pop("progress", None)
    settings: dict[str, Any] = {"prompt": PROMPT, "steps": 4, "scale": 3.0, "sampler": "dpmpp_2m", "seed": 11}
    first = DrawRequest(**(settings | changes))
    return pipe.pixels(*(replace(first, seed=first.seed + i) for i in range(n)), progress=progress)


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [(kind, name) for kind in ("dit", "unet") for name in SAMPLERS if not SAMPLERS[name].learned_variance]
    + [("learned", name) for name in ("ddpm_learned", "euler_ancestral")],
)
def test_a_picture_is_the_same_alone_and_in_a_batch(kind, sampler, request):
    pipe = TextToImage.load(request.getfixturevalue(f"{kind}_folder"))
    steps = 8 if sampler == "restart" else 4  # Heun's method on Karras's grid multiplies rounding if steps are large
    together = draw(pipe, sampler=sampler, n=3, steps=steps)
    for i in range(3):
        alone = draw(pipe, sampler=sampler, seed=11 + i, steps=steps)
        assert (together[i] - alone[0]).abs().max() <= 1e-4


def test_more_pictures_than_fit_a_batch_are_drawn_in_turns(dit_folder, monkeypatch):
    pipe = TextToImage.load(dit_folder)
    whole = draw(pipe, n=5)
    monkeypatch.setattr("ldm.inference.pipeline.MAX_BATCH", 2)
    calls = []
    in_turns = draw(pipe, n=5, progress=lambda done, total: calls.append((done, total)))
    torch.testing.assert_close(whole, in_turns, atol=1e-4, rtol=0)
    assert calls == [(i + 1, 12) for i in range(12)]


@pytest.mark.parametrize(
    "sampler", ["ddim", "heun", "dpm2", "plms", "pndm", "dpm_fast", "dpm_adaptive", "dpmpp_sde", "restart"]
)
def test_progress_counts_steps_whatever_the_evaluations(dit_folder, sampler):
    calls = []
    draw(TextToImage.load(dit_folder), sampler=sampler, steps=6, progress=lambda *call: calls.append(call))
    done = [done for done, _ in calls]
    assert done == sorted(set(done)) and done[-1] == 6 and {total for _, total in calls} == {6}


def test_where_guidance_is_off_nothing_is_evaluated_twice(dit_folder, monkeypatch):
    pipe, calls = TextToImage.load(dit_folder), []
    forward = pipe.denoiser.forward
    monkeypatch.setattr(pipe.denoiser, "forward", lambda *inputs: calls.append(0) or forward(*inputs))
    draw(pipe, steps=10)
    assert len(calls) == 20
    calls.clear()
    draw(pipe, steps=10, options=DrawOptions(guidance_interval=(0.35, 0.75)))  # of 1.0, 0.9, ..., 0.1: 0.7 to 0.4
    assert len(calls) == 14


def test_a_learned_variance_is_drawn_with_and_costs_no_evaluation(learned_folder, monkeypatch):
    pipe, calls = TextToImage.load(learned_folder), []
    assert pipe.denoiser.learned_variance
    forward = pipe.denoiser.forward
    monkeypatch.setattr(pipe.denoiser, "forward", lambda *inputs: calls.append(0) or forward(*inputs))
    learned = draw(pipe, sampler="ddpm_learned", options=DrawOptions(guidance_interval=(0.0, 0.6)))
    assert len(calls) == 6
    fixed = draw(pipe, sampler="ddpm", options=DrawOptions(guidance_interval=(0.0, 0.6)))
    assert (learned - fixed).abs().max() > 1e-3


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue car"},
        {"negative_prompt": "blue"},
        {"scale": 1.0},
        {"seed": 12},
        {"steps": 5},
        {"sampler": "ddpm"},
        {"options": DrawOptions(time_grid="karras")},
        {"options": DrawOptions(time_grid="1, 0.9, 0.3, 0.1, 0")},
        {"options": DrawOptions(guidance_schedule="linear")},
        {"options": DrawOptions(guidance_interval=(0.1, 0.6))},
        {"options": DrawOptions(guidance_rescale=0.7)},
        {"options": DrawOptions(guidance_parallel=0.0)},
        {"options": DrawOptions(guidance_norm_limit=0.01)},
        {"options": DrawOptions(guidance_momentum=-0.5)},
    ],
)
def test_everything_that_is_asked_for_changes_the_picture(dit_folder, change):
    pipe = TextToImage.load(dit_folder)
    assert (draw(pipe) - draw(pipe, **change)).abs().max() > 1e-3


def test_eta_changes_the_picture(dit_folder):
    pipe = TextToImage.load(dit_folder)
    without, some = (draw(pipe, sampler="ddim", options=DrawOptions(eta=eta)) for eta in (0.0, 0.5))
    assert torch.equal(without, draw(pipe, sampler="ddim")) and (without - some).abs().max() > 1e-3


def test_scale_one_ignores_the_negative_prompt(dit_folder):
    pipe = TextToImage.load(dit_folder)
    assert torch.equal(draw(pipe, scale=1.0), draw(pipe, scale=1.0, negative_prompt="blue"))


def test_other_sizes_than_the_native_one(dit_folder):
    pipe = TextToImage.load(dit_folder)
    assert (pipe.native_size, pipe.factor) == (16, 4)
    assert draw(pipe, height=24, width=32).shape == (1, 3, 24, 32)
    assert pipe("x", steps=1, n=2)[1].size == (16, 16)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"height": 18}, "height is 18"),
        ({"width": -4}, "width is -4"),
        ({"sampler": "eulr"}, "no sampler 'eulr', did you mean euler"),
        ({"sampler": "ddpm_learned"}, "sampler DDPM learned needs a network that has learned its variance"),
        ({"options": DrawOptions(eta=0.5)}, r"sampler DPM\+\+ 2M has no eta"),
        ({"options": DrawOptions(time_grid="leading")}, "path rectified_flow has none: use trailing"),
        ({"options": DrawOptions(time_grid="karas")}, "no time grid 'karas', did you mean karras"),
        ({"options": DrawOptions(time_grid="1, 0.5, 0")}, "the time grid has 3 times, expected one more than steps, 4"),
        ({"steps": 0}, "steps is 0, expected 1 to 1000"),
        ({"scale": -1.0}, "scale is -1.0"),
    ],
)
def test_what_cannot_be_drawn_is_named(dit_folder, change, named):
    with pytest.raises(ValueError, match=named):
        draw(TextToImage.load(dit_folder), **change)


def test_no_picture_at_all_is_refused(dit_folder):
    with pytest.raises(ValueError, match="n is 0"):
        TextToImage.load(dit_folder)(PROMPT, n=0)


def test_each_prompt_of_a_list_gets_its_own_picture(dit_folder):
    pipe = TextToImage.load(dit_folder)
    apple = DrawRequest(prompt="a red apple", steps=3, scale=3.0, sampler="euler", seed=5)
    car = replace(apple, prompt="a blue car", seed=6)
    torch.testing.assert_close(pipe.pixels(apple, car)[1:], pipe.pixels(car), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="the requests differ in more than prompt and seed"):
        pipe.pixels(apple, replace(car, steps=4))


def test_bfloat16_draws_nearly_the_same(dit_folder):
    exact = draw(TextToImage.load(dit_folder))
    rounded = draw(TextToImage.load(dit_folder, dtype="bf16"))
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().mean() < 0.05


def test_a_prompt_that_is_too_long_says_what_is_lost(dit_folder):
    pipe = TextToImage.load(dit_folder)
    assert pipe.cut_off("a red apple") == ""
    assert pipe.cut_off(long := "apple " * 40).split() == ["apple"] * 10
    with pytest.warns(UserWarning, match="a prompt is too long for the model, its end is ignored: apple") as told:
        request = DrawRequest(prompt=long, negative_prompt=f"{long}\nand more", steps=1, seed=1)
        first, second = pipe.draw(request, n=2)
    lines = [str(one.message) for one in told]
    assert lines == first.recipe.remarks.splitlines() == second.recipe.remarks.splitlines()
    assert len(lines) == 2 and lines[1].endswith("\\nand more")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in chunks nothing is lost
        pipe(long, steps=1, options=DrawOptions(weighting="a1111"))


def test_a_decoded_picture_that_is_no_number_is_an_error(dit_folder):
    pipe = TextToImage.load(dit_folder)
    with torch.no_grad():
        pipe.model.vae.decoder.conv_in.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="NaN"):
        draw(pipe)


@pytest.mark.parametrize("kind", ["dit", "unet", "learned"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_diffusers_draws_the_same_picture(kind, scale, request, monkeypatch):
    from diffusers import DiffusionPipeline

    folder = request.getfixturevalue(f"{kind}_folder")
    theirs: Any = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    ours = TextToImage.load(folder)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(11))
    extra = (
        {"max_sequence_length": 32, "use_resolution_binning": False, "clean_caption": False} if kind != "unet" else {}
    )
    size = {"height": 16, "width": 16}
    picture = theirs(
        PROMPT, num_inference_steps=8, guidance_scale=scale, latents=noise, output_type="np", **size, **extra
    )
    expected = torch.from_numpy(picture.images[0]).permute(2, 0, 1)
    if kind == "dit":
        # diffusers' grid for flows starts at 0.999, not 1, and the network is told whole thousandths, cut off.
        times = theirs.scheduler.sigmas.double()
        monkeypatch.setattr("ldm.inference.course.time_grid", lambda path, steps, grid: times)
        monkeypatch.setattr("ldm.model.latent_diffusion.prior_std", lambda path, start: 1.0)
        monkeypatch.setattr(RectifiedFlowPath, "timesteps", lambda self, t: (1000 * t).floor())
    found = (draw(ours, steps=8, scale=scale)[0].clamp(-1, 1) + 1) / 2
    assert expected.std() > 0.01  # not a blank sheet
    assert (found - expected).abs().max() <= 1e-4


def test_on_edms_path_the_network_sees_unit_variance_from_the_first_step_on(edm_folder):
    pipe = TextToImage.load(edm_folder)
    seen = []
    pipe.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[:2]))
    pictures = draw(pipe, n=4, steps=6)
    assert pictures.isfinite().all() and pictures.std() > 0.01
    first, timesteps = seen[0]
    assert first.std().item() == pytest.approx(1.0, abs=0.1)
    assert timesteps.tolist() == pytest.approx([math.log(80) / 4] * 4)
    assert timesteps.shape == (4,) and len(seen) == 12  # with and without the prompt


def test_a_missing_folder_and_a_folder_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        TextToImage.load(tmp_path / "nowhere")
    (tmp_path / "holiday.txt").write_text("sun")
    with pytest.raises(ValueError, match=r"holds 1 \.txt, expected unet/ or transformer/"):
        TextToImage.load(tmp_path)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
@pytest.mark.parametrize("fault", ["missing", "cut short"])
def test_damaged_weights_name_the_file(dit_folder, tmp_path, part, fault):
    folder = shutil.copytree(dit_folder, tmp_path / "copy")
    (file,) = (folder / part).glob("*.safetensors")
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises((ValueError, FileNotFoundError), match=part):
        TextToImage.load(folder)


def test_a_runs_folder_stands_for_its_newest_model(dit_folder, tmp_path):
    shutil.copytree(dit_folder, tmp_path / "myrun" / "model")
    for path in (tmp_path / "myrun", tmp_path / "myrun" / "model"):
        pipe = TextToImage.load(path)
        assert pipe.weights_hash == TextToImage.load(dit_folder).weights_hash
        assert pipe.name == "myrun"  # which the picture's metadata will say


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("unet", "the denoiser is made for 4 and 3 more latent channels, the autoencoder for 4"),
        ("text_encoder", "the denoiser is made for 16 wide a context, the text encoder for 24"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(unet_folder, tmp_path, part, message):
    folder = shutil.copytree(unet_folder, tmp_path / "copy")
    if part == "unet":
        config = TextToImage.load(folder).parts.config
        assert isinstance(config, UNetConfig)
        unet = UNet(config, latent_channels=4, concat_channels=3, context_width=16)
        save_denoiser(LoadedDenoiser(unet, config, sample_size=8, context_width=16), folder / "unet")
    else:
        config = TextEncoderConfig(width=24, layers=1, heads=2, intermediate_size=8, projection_dim=8)
        save_text_encoder(TransformersTextEncoder(config), folder / "text_encoder")
    with pytest.raises(ValueError, match=f"copy: {message}"):
        TextToImage.load(folder)


def test_the_training_loss_is_that_of_its_parts(dit_folder):
    """|| network(x_t, t, caption) - (eps - x0) ||^2 on rectified flow, each sample with its own time and caption."""
    pipe = TextToImage.load(dit_folder)
    x0, eps = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, captions = torch.tensor([0.1, 0.5, 0.9]), ["a cat", "", "a red apple"]
    with torch.no_grad():
        found, bound = pipe.model.losses(pipe.denoiser, x0, eps, t, pipe.model.conditioner(captions))
        for i in range(3):
            condition = pipe.model.conditioner([captions[i]])
            x_t = (1 - t[i]) * x0[i : i + 1] + t[i] * eps[i : i + 1]
            output = pipe.denoiser(x_t, 1000 * t[i : i + 1], condition).prediction
            assert bound is None and found[i].item() == pytest.approx(
                (output[0] - (eps[i] - x0[i])).square().mean().item(), rel=1e-4
            )


def test_unknown_device_and_dtype(dit_folder):
    with pytest.raises(ValueError, match="'gpu'"):
        TextToImage.load(dit_folder, device="gpu")
    with pytest.raises(ValueError, match="'int3'"):
        TextToImage.load(dit_folder, dtype="int3")
