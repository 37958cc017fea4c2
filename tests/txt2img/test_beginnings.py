"""The command `txt2img.py` with a picture to begin with, with LoRAs and the like; the model paints, not draws."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import get_args

import pytest
import torch
from helpers.painting import pngs
from helpers.zoo import zoo
from PIL import Image
from safetensors.torch import save_file

from ldm.diffusion import Prediction
from ldm.inference.flags import PREDICTIONS
from ldm.inference.options import DrawOptions
from ldm.inference.recipe import lora_hash, read_recipes


@pytest.fixture
def pictures(model) -> None:
    """photo.png of 50 x 41 and mask.png, in the folder to work in."""
    Image.new("RGB", (50, 41), (200, 30, 30)).save("photo.png")
    Image.new("L", (50, 41), 255).save("mask.png")


def short_hash(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:10]


def test_a_picture_to_begin_with(command, model, pictures):
    code, _, err = command("--prompt", "x", "--init-img", "photo.png", "--strength", "0.4", "--n-samples", "2")
    assert code == 0 and err == (
        "warning: the picture has 50 x 41 pixels, far from the 16 x 16 of tiny: it is scaled to 16 x 16; height and "
        "width (--H and --W) choose another size\n"
    )
    (call,) = model.calls
    assert call["image"] == (50, 41) and call["mask"] is None and call["strength"] == 0.4
    assert (call["height"], call["width"]) == (16, 16)
    recipe = read_recipes(Path("outputs/samples/00001.png"))[0]
    assert (recipe.init_image, recipe.mask, recipe.strength) == (short_hash("photo.png"), "", 0.4)
    assert recipe.init_size == "50 x 41"
    with Image.open("outputs/samples/00000.png") as image:
        assert (
            f"Denoising strength: 0.4, Init image hash: {short_hash('photo.png')}, RNG: CPU, Version"
            in image.info["parameters"]
        )


@pytest.mark.parametrize("words", [("--init-img", "--mask"), ("--image_path", "--mask_path")])
def test_a_mask(command, model, pictures, words):
    assert command("--prompt", "x", words[0], "photo.png", words[1], "mask.png", "--H", "64", "--W", "32")[0] == 0
    (call,) = model.calls
    assert (call["mask"], call["strength"], call["height"], call["width"]) == ((50, 41), 1.0, 64, 32)
    recipe = read_recipes(Path("outputs/samples/00000.png"))[0]
    assert (recipe.mask, recipe.strength) == (short_hash("mask.png"), 1.0)


def test_a_soft_edge_and_holes_as_a_mask(command, model, pictures):
    """Words of the command line, in the request and in the record."""
    Image.new("RGBA", (16, 16), (9, 9, 9, 0)).save("hole.png")
    assert command("--prompt", "x", "--init-img", "photo.png", "--mask", "mask.png", "--mask-blur", "8")[0] == 0
    assert model.calls[0]["options"] == DrawOptions(mask_edge=8)
    words = ("--init-img", "hole.png", "--transparency", "mask", "--mask_edge", "2")
    assert command("--prompt", "x", *words)[::2] == (0, "")
    call, options = model.calls[1], DrawOptions(mask_edge=2, transparency="mask")
    assert (call["mask"], call["strength"], call["options"]) == ((16, 16), 1.0, options)
    recipe = read_recipes(Path("outputs/samples/00004.png"))[0]
    assert (recipe.mask, recipe.options, recipe.init_size) == ("transparency", options, "16 x 16")
    code, _, err = command("--prompt", "x", "--init-img", "hole.png")
    assert code == 0 and err == (
        "warning: the picture's transparent parts become white; transparency 'mask' (--transparency mask) repaints "
        "them instead\n"
    )


@pytest.mark.parametrize("name", ["EXIF, beside tag 0x100 of type 1, 1", "PNG, odd cHRM"])
def test_odd_metadata_of_a_picture_harms_nothing(command, model, name):
    odd = next(odd for odd in zoo() if odd.name == name)
    Path("odd.jpg").write_bytes(odd.data)
    assert command("--prompt", "x", "--init-img", "odd.jpg", "--H", "16", "--W", "16")[0] == 0
    assert odd.shows is not None and model.calls[0]["image"] == odd.shows.shape[1::-1]


def test_what_is_no_picture_names_the_remedy(command, model):
    """The remedy that a message names is in it, at the command line as anywhere else."""
    for name, words in (("HEIC", "pip install pillow-heif"), ("EPS", "convert it to PNG")):
        odd = next(odd for odd in zoo() if odd.name == f"no picture: {name}")
        Path("a.jpg").write_bytes(odd.data)
        code, _, err = command("--prompt", "x", "--init-img", "a.jpg")
        assert code == 2 and err.startswith("error: a.jpg cannot be used as a picture: it is ") and words in err


def test_the_usual_strength_is_recorded_too(command, model, pictures):
    assert command("--prompt", "x", "--init-img", "photo.png")[0] == 0
    assert read_recipes(Path("outputs/samples/00000.png"))[0].strength == model.calls[0]["strength"] == 0.75


def test_what_is_put_together_with_the_model(command, model):
    Path("v.ckpt").write_text("v")
    for name in ("a", "b"):
        save_file({name: torch.ones(1)}, f"{name}.safetensors")
    words = (
        "--lora",
        "a.safetensors:0.8",
        "--lora",
        "b.safetensors",
        "--vae",
        "v.ckpt",
        "--no-ema",
        "--prediction",
        "v",
    )
    assert command("--prompt", "x", *words)[0] == 0
    assert model.about == {
        "lora": [(Path("a.safetensors"), 0.8), (Path("b.safetensors"), 1.0)],
        "vae": Path("v.ckpt"),
        "text": None,
        "ema": False,
        "prediction": "v",
    }
    recipe = read_recipes(Path("outputs/samples/00000.png"))[0]
    loras = f"a.safetensors:0.8 {short_hash('a.safetensors')}, b.safetensors {short_hash('b.safetensors')}"
    assert (recipe.loras, recipe.vae) == (loras, f"v.ckpt {short_hash('v.ckpt')}")
    assert (recipe.prediction, recipe.ema) == ("v", False)
    with Image.open("outputs/samples/00000.png") as image:
        text = image.info["parameters"]
        assert text.startswith("x<lora:a:0.8><lora:b:1>\n")
        assert f"VAE hash: {short_hash('v.ckpt')}, VAE: v.ckpt, RNG: CPU" in text
        hashes = ", ".join(f"{name}: {lora_hash(Path(f'{name}.safetensors'))}" for name in ("a", "b"))
        assert f'Lora hashes: "{hashes}", Version' in text


def test_predictions_are_those_that_there_are():
    assert get_args(Prediction) == PREDICTIONS


def test_nothing_of_it_by_default(command, model):
    assert command("--prompt", "x")[0] == 0
    assert model.about == {"lora": [], "vae": None, "text": None, "ema": True, "prediction": None}


def test_weighted_words(command, model):
    code, _, err = command("--prompt", "a very (long:1.2) prompt that goes on", "--weighting", "a1111")
    assert (code, err) == (0, "")
    assert model.calls[0]["options"] == DrawOptions(weighting="a1111")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--mask", "mask.png"], "--mask was given without --init-img, which it needs: give both"),
        (["--mask-edge", "5"], "--mask-edge was given without --init-img, which it needs: give both"),
        (["--transparency", "mask"], "--transparency was given without --init-img, which it needs: give both"),
        (["--init-img", "photo.png", "--mask-edge", "5"], "mask edge is 5, but there is no mask: give one, too"),
        (["--init-img", "photo.png", "--mask", "mask.png", "--mask-edge", "-1"], "mask edge is -1, expected 0 to 256"),
        (["--init-img", "photo.png", "--transparency", "black"], "invalid choice: 'black'"),
        (["--init-img", "photo.png", "--transparency", "mask"], "there is no picture with transparent parts: give a"),
        (["--strength", "0.5"], "--strength was given without --init-img, which it needs: give both"),
        (["--init-img", "nowhere.png"], "there is no picture nowhere.png"),
        (["--init-img", "model"], "there is no picture model"),
        (["--init-img", "notes.txt"], "notes.txt cannot be used as a picture: it is "),
        (["--init-img", "half.png"], "half.png cannot be used as a picture: it is "),
        (["--init-img", "photo.png", "--mask", "notes.txt"], "notes.txt cannot be used as a picture: it is "),
        (["--init-img", "photo.png", "--strength", "0"], "--strength is 0.0, expected above 0 and at most 1"),
        (["--init-img", "photo.png", "--strength", "1.5"], "--strength is 1.5, expected above 0 and at most 1"),
        (["--init-img", "photo.png", "--strength", "nan"], "--strength is nan, expected above 0 and at most 1"),
        (["--init-img", "photo.png", "--H", "30"], "height is 30, expected a multiple of 8: use 24 or 32"),
        (["--lora", "a.safetensors:1000"], "1000"),
        (["--lora", "nowhere:0.5"], "--lora is nowhere, which does not exist"),
        (["--vae", "nowhere"], "--vae is nowhere, which does not exist"),
        (["--init-img", "photo.png", "--strength", "0.01"], "--strength 0.01 leaves none of 30 steps"),
        (["--prediction", "magic"], "invalid choice: 'magic'"),
        (["--weighting", "compel"], "invalid choice: 'compel'"),
        (["--weighting", "a1111", "--negative-prompt", "(x:1000)"], "'x' has weight 1000"),
    ],
)
def test_mistakes_are_one_line(command, model, pictures, words, told):
    Path("notes.txt").write_text("not a picture")
    Path("half.png").write_bytes(Path("photo.png").read_bytes()[:60])
    code, _, err = command("--prompt", "x", *words)
    assert code == 2 and len(err.splitlines()) == 1 and told in err
    assert not Path("outputs").exists() and model.calls == []


def test_nothing_is_written_beside_the_pictures(command, pictures):
    assert command("--prompt", "x", "--init-img", "photo.png", "--n-samples", "1", "--skip-grid")[0] == 0
    assert pngs() == ["samples/00000.png"]
