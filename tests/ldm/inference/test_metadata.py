"""Metadata in PNG files, by A1111's own rules and by round trip."""

import dataclasses
import json

import pytest
from helpers.a1111 import parse_generation_parameters
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.inference.infotext import SAME_PICTURE, parameters_text
from ldm.inference.options import DrawOptions
from ldm.inference.recipe import Recipe, png_bytes, read_recipes, software
from ldm.samplers import SAMPLERS

RECIPE = Recipe(
    prompt="a red apple", negative_prompt="leaves, stalk", steps=30, scale=7.5, sampler="dpmpp_2m", seed=42, width=64,
    height=48, model="emoji64", weights_hash="0123456789", device="cpu", precision="fp32", software="Latent Foundry 1",
)  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60)
RECIPES = st.builds(
    Recipe, prompt=TEXT, negative_prompt=TEXT, steps=st.integers(1, 1000),
    scale=st.floats(0, 1e30), sampler=st.sampled_from(list(SAMPLERS)), seed=st.integers(0, 2**63 - 1),
    width=st.integers(1, 4096), height=st.integers(1, 4096), model=TEXT, weights_hash=st.just("00a1b2c3d4"),
    device=st.just("auto"), precision=st.just("bf16"), software=st.just("Latent Foundry, version: 1"),
)  # fmt: skip


def test_parameters_text():
    assert parameters_text(RECIPE) == (
        "a red apple\nNegative prompt: leaves, stalk\nSteps: 30, Sampler: DPM++ 2M, Schedule type: SGM Uniform, "
        "CFG scale: 7.5, Seed: 42, Size: 64x48, Model hash: 0123456789, Model: emoji64, RNG: CPU, "
        "SGM noise multiplier: True, Version: Latent Foundry 1"
    )
    changed = dataclasses.replace(
        RECIPE, prompt="[a]", negative_prompt="", scale=5.0, model='a, "b": c\nd', sampler="ddim", software="x:1"
    )
    assert parameters_text(changed) == (
        "[a]\nSteps: 30, Sampler: DDIM, Schedule type: SGM Uniform, CFG scale: 5, Seed: 42, "
        'Size: 64x48, Model hash: 0123456789, Model: "a, \\"b\\": c\\nd", RNG: CPU, Emphasis: None, Version: "x:1"'
    )


@given(RECIPES)
@example(dataclasses.replace(RECIPE, model=" a"))
@example(dataclasses.replace(RECIPE, model="a "))
@example(dataclasses.replace(RECIPE, model='"a"'))
@example(dataclasses.replace(RECIPE, model="a\nb"))
@example(dataclasses.replace(RECIPE, model=""))
@example(dataclasses.replace(RECIPE, model='a, "b": \\c\nd'))
def test_a1111_reads_the_values_of_any_recipe(recipe):
    values = parse_generation_parameters(parameters_text(recipe))
    assert values.get("Model", "") == recipe.model
    assert values["Version"] == recipe.software
    assert (int(values["Steps"]), int(values["Seed"])) == (recipe.steps, recipe.seed)
    assert float(values["CFG scale"]) == recipe.scale
    assert (values["Size-1"], values["Size-2"]) == (str(recipe.width), str(recipe.height))
    assert values["Sampler"] in (SAMPLERS[recipe.sampler].label, SAME_PICTURE.get(recipe.sampler))
    assert values["Model hash"] == recipe.weights_hash


def clean(text: str) -> str:
    """What A1111's reader keeps of a prompt: it strips the lines, and the whole."""
    return "\n".join(line.strip() for line in text.strip().split("\n"))


@given(RECIPES.filter(lambda r: "Negative prompt:" not in r.prompt + r.negative_prompt))
def test_a1111_reads_any_prompt(recipe):
    # An empty first or last line is lost to it, as in A1111's own pictures.
    recipe = dataclasses.replace(recipe, prompt=clean(recipe.prompt), negative_prompt=clean(recipe.negative_prompt))
    values = parse_generation_parameters(parameters_text(recipe))
    assert (values["Prompt"], values["Negative prompt"]) == (recipe.prompt, recipe.negative_prompt)


@given(st.lists(RECIPES, min_size=1, max_size=3))
def test_round_trip_through_a_file(tmp_path_factory, recipes):
    path = tmp_path_factory.getbasetemp() / "round_trip.png"
    path.write_bytes(png_bytes(Image.new("RGB", (2, 1), "red"), recipes))
    assert read_recipes(path) == recipes
    with Image.open(path) as image:
        assert image.info["parameters"] == parameters_text(recipes[0])
        assert image.getpixel((1, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    "prompt", ["", "Negative prompt: x", "Steps: 1, Sampler: y, Seed: 2", '"', "\\", "a\r\nb", "🍎\n é\x85"]
)
def test_nasty_prompts_round_trip(tmp_path, prompt):
    recipe = dataclasses.replace(RECIPE, prompt=prompt, negative_prompt=prompt)
    (tmp_path / "x.png").write_bytes(png_bytes(Image.new("RGB", (1, 1)), [recipe]))
    assert read_recipes(tmp_path / "x.png") == [recipe]


def test_chunks():
    """Strict readers know tEXt alone: ours always is, A1111's where Latin-1 can hold it. Same input, same bytes."""
    image = Image.new("RGB", (1, 1))
    plain = png_bytes(image, [RECIPE])
    assert plain.count(b"tEXt") == 2
    assert b"tEXtparameters\0a red apple\n" in plain
    assert b'tEXtfoundry\0{"prompt": "a red apple"' in plain
    assert plain == png_bytes(image, [RECIPE])
    apple = png_bytes(image, [dataclasses.replace(RECIPE, prompt="🍎")])
    assert b"iTXtparameters\0" in apple
    assert b"tEXtfoundry\0" in apple


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no text 'foundry'"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("3", "is not a recipe"),
        ("{}", "is not a recipe"),
        (json.dumps(dataclasses.asdict(RECIPE) | {"seed": "42"}), "is not a recipe"),
        (json.dumps(dataclasses.asdict(RECIPE) | {"extra": 1}), "is not a recipe"),
    ],
)
def test_other_texts_are_refused(tmp_path, text, message):
    info = PngInfo()
    if text is not None:
        info.add_text("foundry", text)
    Image.new("RGB", (1, 1)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(ValueError, match=f"x.png.*{message}"):
        read_recipes(tmp_path / "x.png")


def test_software(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", {"latent-foundry": "1.2"}.__getitem__)
    assert software() == "Latent Foundry 1.2"
    monkeypatch.undo()
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: (_ for _ in ()).throw(_not_found(name)))
    assert software() == "Latent Foundry"


def _not_found(name: str) -> Exception:
    import importlib.metadata

    return importlib.metadata.PackageNotFoundError(name)


OPTIONS = DrawOptions(eta=0.5, time_grid="1, 0.5, 0", guidance_interval=(0.1, 0.9), guidance_norm_limit=2.0)


def test_options_are_told_and_kept(tmp_path):
    recipe = dataclasses.replace(RECIPE, options=OPTIONS)
    assert parameters_text(recipe).endswith(
        'Model: emoji64, Time grid: "1, 0.5, 0", RNG: CPU, SGM noise multiplier: True, Eta: 0.5, '
        "Guidance interval: 0.1 to 0.9, Guidance norm limit: 2.0, Version: Latent Foundry 1"
    )
    path = tmp_path / "x.png"
    path.write_bytes(png_bytes(Image.new("RGB", (64, 48)), [recipe]))
    assert read_recipes(path) == [recipe]


def write_foundry(path, content):
    info = PngInfo()
    info.add_text("foundry", json.dumps(content))
    Image.new("RGB", (64, 48)).save(path, pnginfo=info)


def test_pictures_of_before_there_were_options_are_read(tmp_path):
    fields = {key: value for key, value in dataclasses.asdict(RECIPE).items() if key != "options"}
    write_foundry(tmp_path / "x.png", fields)
    assert read_recipes(tmp_path / "x.png") == [RECIPE]


@pytest.mark.parametrize("options", [{"eta": 7}, {"eat": 0.5}, [1], {"guidance_interval": 3}, {"eta": "x"}])
def test_options_that_are_none_are_refused(tmp_path, options):
    write_foundry(tmp_path / "x.png", dataclasses.asdict(RECIPE) | {"options": options})
    with pytest.raises(ValueError, match="has invalid options|is not a recipe"):
        read_recipes(tmp_path / "x.png")
