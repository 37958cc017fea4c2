"""`pipe(...)` as Python programs call it: lists, arrays, tensors, kinds of output, callbacks, threads."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import DrawOptions, DrawRequest, TextToImage
from ldm.inference.given_pictures import given_picture
from ldm.inference.progress import Step
from ldm.inference.recipe import png_bytes, read_recipes

QUICK: dict[str, Any] = {"steps": 2, "scale": 3.0, "sampler": "euler", "seed": 5}


@pytest.fixture(scope="module")
def pipe(dit_folder) -> TextToImage:
    return TextToImage.load(dit_folder)


def pixels(images: list[Image.Image]) -> list[bytes]:
    return [image.tobytes() for image in images]


def test_a_list_of_prompts_draws_each_as_alone(pipe):
    prompts, negatives, seeds = ["a cat", "a red apple", "a car"], ["", "blue", "blue"], [3, 8, 3]
    one = QUICK | {"output_type": "np"}
    together = pipe(prompts, negative_prompt=negatives, n=2, **one | {"seed": seeds})
    given = zip(prompts, negatives, seeds, strict=True)
    alone = [pipe(p, negative_prompt=negative, n=2, **one | {"seed": seed}) for p, negative, seed in given]
    assert together.shape == (6, 16, 16, 3)
    assert np.abs(together - np.concatenate(alone)).max() <= 1e-4
    assert np.abs(together[2] - together[4]).max() > 1e-2


def test_what_is_no_list_counts_for_all(pipe):
    three = pipe("a cat", **QUICK | {"seed": np.arange(5, 8), "output_type": "pt"})
    torch.testing.assert_close(three, pipe("a cat", n=3, **QUICK, output_type="pt"), atol=1e-4, rtol=0)
    two = pipe(("a cat", "a dog"), **QUICK | {"seed": torch.tensor([5, 5])})
    assert [image.info["foundry"].count('"seed": 5') for image in two] == [1, 1]


def test_progress_counts_over_all_entries_of_a_list(pipe):
    calls: list[tuple[int, int]] = []
    pipe(["a", "b"], negative_prompt=["", "c"], progress=lambda *call: calls.append(call), **QUICK)
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"prompt": []}, ValueError, r"the lists have different lengths or are empty \(0 of prompt\)"),
        ({"prompt": ["a", "b"], "seed": [1]}, ValueError, r"\(2 of prompt, 1 of seed\): give one value for each"),
        ({"prompt": None}, TypeError, "the prompt is a NoneType, expected text"),
        ({"prompt": ["a", 3]}, TypeError, "the prompt is a int, expected text"),
        ({"negative_prompt": b"a"}, TypeError, "the negative prompt is a bytes, expected text"),
        ({"steps": "20"}, TypeError, "steps is '20', expected a whole number"),
        ({"steps": 2.5}, TypeError, "steps is 2.5, expected a whole number"),
        ({"steps": True}, TypeError, "steps is True, expected a whole number"),
        ({"scale": "7"}, TypeError, "scale is '7', expected a number"),
        ({"seed": "x"}, TypeError, "seed is 'x', expected a whole number"),
        ({"sampler": None}, TypeError, "the sampler is a NoneType, expected text"),
        ({"n": "2"}, TypeError, "n is '2', expected a whole number"),
        ({"n": 0}, ValueError, "n is 0, expected at least 1 picture"),
        ({"options": {"eta": 1}}, TypeError, r"options is a dict, expected DrawOptions\(...\)"),
        ({"output_type": "pli"}, ValueError, "no output type 'pli', did you mean pil"),
        ({"num_inference_steps": 3}, TypeError, "no setting num_inference_steps, did you mean steps?"),
        ({"guidance_scale": 3}, TypeError, "no setting guidance_scale, did you mean scale?"),
        ({"num_images_per_prompt": 3}, TypeError, "no setting num_images_per_prompt, did you mean n?"),
        ({"generator": 3}, TypeError, "no setting generator, did you mean seed?"),
        ({"stpes": 3}, TypeError, "no setting stpes, did you mean steps?"),
        ({"zzz": 3}, TypeError, "no setting zzz, expected height, image, mask"),
        ({"eta": 0.5}, TypeError, r"eta is one of the options: give options=DrawOptions\(eta=...\)"),
        ({"callback": 3}, TypeError, "callback is a int, expected a function"),
        ({"image": 3}, TypeError, "image is a int, expected a PIL image, a path, a NumPy array or a PyTorch tensor"),
        ({"image": "nowhere.png"}, FileNotFoundError, "there is no picture nowhere.png"),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_is_expected(pipe, changes, error, message):
    with pytest.raises(error, match=message) as raised:
        pipe(**QUICK | {"prompt": "a cat"} | changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"time_grid": [1, 0.5, 0]}, "the time grid is a list, expected text"),
        ({"guidance_schedule": 3}, "the guidance schedule is a int, expected text"),
        ({"guidance_interval": 0.5}, r"the guidance interval is 0.5, expected a pair, such as \(0.1, 0.8\)"),
        ({"guidance_interval": ("0", "1")}, "a time of the guidance interval is '0', expected a number"),
        ({"eta": "1"}, "eta is '1', expected a number"),
        ({"clip_skip": 1.5}, "clip skip is 1.5, expected a whole number"),
    ],
)
def test_a_wrong_option_is_one_line_too(options, message):
    with pytest.raises(TypeError, match=message):
        DrawOptions(**options)


def test_the_remedies_for_names_work(pipe):
    drawn = pipe("a cat", **QUICK | {"sampler": "ddim", "options": DrawOptions(eta=0.5)})
    assert drawn[0].size == (16, 16)


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
RGB = np.arange(36, dtype=np.uint8).reshape(3, 4, 3) * 7
RGBA = np.concatenate([RGB, GREY[..., None]], axis=2)
UNIT = RGB.astype(np.float32) / 255


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (GREY, GREY),
        (GREY[..., None], GREY),
        (RGB, RGB),
        (RGB[None], RGB),
        (RGBA, RGBA),
        (UNIT, RGB),
        (UNIT.astype(np.float64), RGB),
        (RGB[:, ::-1], RGB[:, ::-1]),
        (GREY > 100, (GREY > 100) * np.uint8(255)),
        (torch.from_numpy(UNIT).permute(2, 0, 1), RGB),
        (torch.from_numpy(UNIT).permute(2, 0, 1)[None].requires_grad_(), RGB),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
        (torch.from_numpy(GREY), GREY),
        (torch.from_numpy(GREY)[None] > 100, (GREY > 100) * np.uint8(255)),
        (torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16), np.array([[0, 255]], dtype=np.uint8)),
    ],
)
def test_arrays_and_tensors_are_pictures(given, expected):
    found = given_picture("image", given)
    assert found.mode == ("L" if expected.ndim == 2 else {3: "RGB", 4: "RGBA"}[expected.shape[2]])
    assert np.array_equal(np.asarray(found), expected)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (UNIT * 2 - 1, ValueError, r"image has values from -1 to .*, expected floats from 0 to 1, or uint8"),
        (np.full((2, 2), np.nan), ValueError, "image has values from nan to nan"),
        (GREY.astype(np.int64), TypeError, "image has elements of type int64, expected uint8, bool or floats"),
        (torch.zeros(2, 3, 4, 4), ValueError, r"image has the shape \(2, 3, 4, 4\), expected one picture: .*C x H x W"),
        (np.zeros((3, 4, 4, 2)), ValueError, r"image has the shape \(3, 4, 4, 2\), .*H x W x C with C 1, 3 or 4"),
        (np.zeros((4, 4, 2)), ValueError, "shape"),
        (np.zeros((0, 4)), ValueError, "shape"),
        (np.zeros(4), ValueError, "shape"),
        ([[0, 1]], TypeError, "image is a list, expected"),
    ],
)
def test_other_arrays_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        given_picture("image", given)


def test_image_and_mask_may_be_given_in_any_form(pipe, tmp_path):
    picture = Image.effect_noise((16, 16), 90).convert("RGB")
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 16, 8))
    picture.save(tmp_path / "picture.png")
    mask.save(tmp_path / "mask.png")
    array, chosen = np.asarray(picture), np.asarray(mask)
    forms: list[tuple[Any, Any]] = [
        (str(tmp_path / "picture.png"), tmp_path / "mask.png"),
        (array, chosen > 0),
        (array / 255, chosen / 255),
        (torch.from_numpy(array.copy()).permute(2, 0, 1), torch.from_numpy(chosen.copy())[None] / 255),
    ]
    expected = pixels(pipe("a cat", image=picture, mask=mask, **QUICK))
    for image, repainted in forms:
        assert pixels(pipe("a cat", image=image, mask=repainted, **QUICK)) == expected
    given: dict[str, Any] = {"image": array, "mask": chosen}
    drawn = pipe.draw(DrawRequest(prompt="a cat", **given, **QUICK))
    assert [drawn[0].image.tobytes()] == expected


def test_output_types_are_those_of_diffusers(pipe):
    pil, array, tensor, latents = (
        pipe("a cat", n=2, **QUICK, output_type=kind) for kind in ("pil", "np", "pt", "latent")
    )
    assert array.shape == (2, 16, 16, 3) and array.dtype == np.float32
    assert tensor.shape == (2, 3, 16, 16) and tensor.dtype == torch.float32
    assert 0 <= array.min() < array.max() <= 1
    assert torch.equal(tensor, torch.from_numpy(array).permute(0, 3, 1, 2))
    assert pixels([Image.fromarray((own * 255).round().astype(np.uint8)) for own in array]) == pixels(pil)
    assert latents.shape == (2, 4, 8, 8)
    assert pixels(pipe.decode(latents)) == pixels(pil)
    again = pipe("a cat", image=array[:1], strength=0.5, **QUICK)
    assert pixels(again) == pixels(pipe("a cat", image=pil[0], strength=0.5, **QUICK))


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_a_callback_gets_the_estimate_of_each_step(pipe, sampler):
    found: list[Step] = []
    settings = QUICK | {"sampler": sampler, "steps": 4}
    latents = pipe("a cat", n=2, callback=found.append, output_type="latent", **settings)
    assert [(step.number, step.steps, step.pictures) for step in found] == [(i, 4, range(2)) for i in range(1, 5)]
    assert [step.time for step in found] == sorted((step.time for step in found), reverse=True)
    assert all(step.x0.shape == latents.shape for step in found)
    distances = [float((step.x0 - latents).abs().mean()) for step in found]
    assert distances[-1] < 1e-4 if sampler == "euler" else distances[-1] < distances[0]
    assert pipe.decode(found[0].x0)[1].size == (16, 16)


def test_a_callback_changes_nothing_and_its_error_ends_the_drawing(pipe):
    plain = pixels(pipe("a cat", **QUICK))
    assert pixels(pipe("a cat", callback=lambda step: step.x0.zero_(), **QUICK)) == plain

    def stop(step: Step) -> None:
        raise InterruptedError("enough")

    with pytest.raises(InterruptedError, match="enough"):
        pipe("a cat", callback=stop, **QUICK)
    assert pixels(pipe("a cat", **QUICK)) == plain


def test_a_callback_is_told_which_pictures_are_drawn_together(pipe, monkeypatch):
    monkeypatch.setattr("ldm.inference.pipeline.MAX_BATCH", 2)
    found: list[range] = []
    pipe("a cat", n=3, callback=lambda step: found.append(step.pictures), **QUICK)
    assert found == [range(2), range(2), range(2, 3), range(2, 3)]


def test_a_picture_saved_by_python_is_the_file_that_txt2img_writes(pipe, tmp_path):
    (image,) = pipe("a cat", **QUICK)
    (drawing,) = pipe.draw(DrawRequest(prompt="a cat", **QUICK))
    assert isinstance(image, Image.Image)
    for number, own in enumerate((image, drawing.image, pickle.loads(pickle.dumps(image)), copy.deepcopy(image))):
        own.save(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").read_bytes() == png_bytes(drawing.image, [drawing.recipe])
    assert read_recipes(tmp_path / "0.png") == [drawing.recipe]
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert buffer.getvalue() == (tmp_path / "0.png").read_bytes()


def test_what_is_made_of_a_picture_does_not_claim_its_record(pipe, tmp_path):
    (image,) = pipe("a cat", **QUICK)
    image.resize((8, 8)).save(tmp_path / "small.png")
    image.save(tmp_path / "picture.jpg")
    image.save(tmp_path / "bare.png", pnginfo=None)
    for name in ("small.png", "picture.jpg", "bare.png"):
        with Image.open(tmp_path / name) as found:
            assert not {"foundry", "parameters"} & found.info.keys()


def test_to_moves_the_model_and_returns_it(pipe):
    assert pipe.to("cpu") is pipe and pipe.to(torch.device("cpu")).device == torch.device("cpu")
    for device in ("gpu", "cuda:7", 3.5):
        with pytest.raises(ValueError, match="device is"):
            pipe.to(device)


def test_threads_take_turns_and_draw_what_they_would_alone(pipe):
    prompts = [f"picture {number}" for number in range(8)]
    alone = [pixels(pipe(prompt, **QUICK)) for prompt in prompts]
    inside, most = 0, 0

    def watched(step: Step) -> None:
        nonlocal inside, most
        inside += step.number == 1
        most = max(most, inside)
        inside -= step.number == step.steps

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda prompt: pixels(pipe(prompt, callback=watched, **QUICK)), prompts))
    assert found == alone
    assert most == 1


def test_a_callback_may_draw(pipe):
    drawn: list[Any] = []
    settings = QUICK | {"steps": 1}
    pipe("a cat", callback=lambda step: drawn.extend(pipe("a dog", **settings)), **settings)
    assert pixels(drawn) == pixels(pipe("a dog", **settings))


def test_a_pipe_can_be_copied(pipe):
    assert pixels(copy.deepcopy(pipe)("a cat", **QUICK)) == pixels(pipe("a cat", **QUICK))
