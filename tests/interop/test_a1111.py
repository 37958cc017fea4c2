"""A picture dropped on A1111 is drawn again: what its rules (tests/helpers/a1111.py) find in our text."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from helpers import a1111
from helpers.stable_diffusion import stable_diffusion
from safetensors.torch import save_file

from ldm import TextToImage
from ldm.diffusion import ScaledLinearBetaPath
from ldm.inference.infotext import SAME_GRIDS, SCHEDULES, parameters_text
from ldm.inference.options import DrawOptions
from ldm.inference.recipe import Recipe, lora_hash, recorded
from ldm.inference.request import DrawRequest
from ldm.interop.read_model import LoadOptions
from ldm.samplers import SAMPLERS, TIME_GRIDS, time_grid

PATH = ScaledLinearBetaPath()
LEVELS = a1111.Levels(PATH.alpha(torch.arange(1, 1001, dtype=torch.float64) / 1000) ** 2)
RECIPE = Recipe(
    prompt="a frog", negative_prompt="", steps=20, scale=7.0, sampler="dpmpp_2m", seed=42, width=512, height=512,
    model="sd-v1-5", weights_hash="6ce0161689", device="cpu", precision="fp32", software="Latent Foundry 1",
)  # fmt: skip


def read(recipe: Recipe) -> dict[str, str]:
    return a1111.parse_generation_parameters(parameters_text(recipe))


def redrawn(recipe: Recipe, schedules: dict[str, tuple[str, ...]] = a1111.SCHEDULES_1_9) -> tuple[str, str]:
    """The sampler and the schedule by their names, with the default of the sampler named."""
    sampler, schedule = a1111.sampler_and_schedule(read(recipe), schedules)
    return sampler, a1111.SAMPLERS[sampler] or schedule if schedule == "Automatic" else schedule


# Prompts.

LINES = ("a frog", "(tall:1.3), [fog]", "Steps: 1, Sampler: x, Seed: 2", 'say "hi"', "\\", "🐸 é", "a: b", "", "<b:1>")


def fuzzed(random: random.Random) -> Recipe:
    """A recipe whose prompts have no line that starts or ends with blanks, or with "Negative prompt:"."""

    def text() -> str:
        letters = "".join(chr(random.choice([*range(33, 127), 0xE9, 0x4E00])) for _ in range(random.randrange(12)))
        lines = random.choices([*LINES, letters], k=random.randrange(1, 4))
        return "\n".join(lines).strip("\n")

    loras = [
        (f"{random.choice('abc')}{i} x, y.safetensors", random.choice(["", ":0.8", ":-1", ":1e-05"])) for i in (1, 2)
    ]
    loras = loras[: random.randrange(3)]
    eta = random.choice([None, 0.25])
    samplers = [name for name, one in SAMPLERS.items() if eta is None or one.eta is not None]
    return replace(
        RECIPE,
        prompt=text(),
        negative_prompt=text(),
        steps=random.randrange(1, 1000),
        scale=random.choice([1.0, 7.5, 1e-7, 30.25]),
        sampler=random.choice(samplers),
        seed=random.choice([0, 1, 2**32, 2**63 - 1]),
        width=8 * random.randrange(1, 300),
        model=random.choice(["a", "my model, v1: 2", ' "x', "\\", "🐸"]),
        vae=random.choice(["", "ft mse.safetensors 0123456789", "folder"]),
        loras=", ".join(f"{name}{strength} 0123456789" for name, strength in loras),
        lora_hashes=", ".join(f"{i}23456789abc" for i in range(len(loras))),
        default_grid=random.choice(["", "trailing", "karras", "leading"]),
        options=DrawOptions(
            eta=eta,
            time_grid=random.choice([None, *TIME_GRIDS, "1, 0.5, 0"]),
            weighting=random.choice(["none", "a1111"]),
            guidance_rescale=random.choice([0.0, 0.7]),
        ),
    )


def test_5000_texts_come_back_as_they_were():
    chance = random.Random(16)
    for _ in range(5000):
        recipe = fuzzed(chance)
        values = read(recipe)
        tags = recipe.loras.count("safetensors")
        prompt, _, tagged = values["Prompt"].partition("<lora:")
        assert (prompt, values["Negative prompt"]) == (recipe.prompt, recipe.negative_prompt), recipe
        assert tagged.count(">") == tags and (values["Steps"], values["Seed"]) == (str(recipe.steps), str(recipe.seed))
        assert (values["Size-1"], values["Size-2"], values["Model"]) == (str(recipe.width), "512", recipe.model)
        assert float(values["CFG scale"]) == recipe.scale and values["RNG"] == "CPU"
        assert values["Schedule type"] in a1111.SCHEDULES_1_10
        assert len(a1111.lora_hashes(values)) == tags
        eta = recipe.options.eta
        assert values.get("Eta DDIM" if recipe.sampler == "ddim" else "Eta") == (None if eta is None else str(eta))


@pytest.mark.parametrize(
    ("prompt", "negative", "theirs"),
    [
        ("a frog  \n  b ", "", ("a frog\nb", "")),  # blanks at the ends of lines
        ("\n\na", "", ("a", "")),  # empty lines at the start
        ("a\nNegative prompt: b", "c", ("a", "b\nc")),  # the words that start the negative prompt
    ],
)
def test_the_documented_limits_of_the_format(prompt, negative, theirs):
    values = read(replace(RECIPE, prompt=prompt, negative_prompt=negative))
    assert (values["Prompt"], values["Negative prompt"]) == theirs


def test_brackets_that_were_words_are_words_there():
    """It weighs them unless it is told that they are not; its reader assumes that they were weighted."""
    drawn = replace(RECIPE, prompt="a (tall) frog")
    assert read(drawn)["Emphasis"] == read(replace(RECIPE, negative_prompt="[a]"))["Emphasis"] == "None"
    assert "Emphasis" not in read(replace(drawn, options=DrawOptions(weighting="a1111")))
    assert "Emphasis" not in read(RECIPE)


def test_the_start_is_scaled_only_where_that_makes_it_equal():
    assert read(RECIPE)["SGM noise multiplier"] == "True"
    assert "SGM noise multiplier" not in read(replace(RECIPE, strength=0.5))
    assert all("SGM noise multiplier" not in read(replace(RECIPE, sampler=name)) for name in ("ddim", "plms"))


# LoRAs and autoencoders.


def test_loras_are_tags_at_the_end_of_the_prompt_and_their_hashes(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "style, v2.safetensors", {"made": "by us"})
    save_file({"a": torch.ones(2)}, tmp_path / "same.safetensors")  # another header
    save_file({"a": torch.ones(2)}, tmp_path / "kohya.safetensors", {"sshs_model_hash": "ab" * 32})
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pt")
    assert lora_hash(tmp_path / "style, v2.safetensors") == lora_hash(tmp_path / "same.safetensors")
    assert lora_hash(tmp_path / "kohya.safetensors") == "abababababab"
    assert len(lora_hash(tmp_path / "old.pt")) == 12 and lora_hash(tmp_path) == ""
    files = [
        (tmp_path / "style, v2.safetensors", 0.8),
        (tmp_path / "kohya.safetensors", 1.0),
        (tmp_path / "old.pt", -1.5),
    ]
    recipe = replace(RECIPE, **recorded(LoadOptions(lora=files)))
    values = read(recipe)
    prompt, loras = a1111.loras(values["Prompt"])
    assert (prompt, loras) == ("a frog", [("style v2", 0.8), ("kohya", 1.0), ("old", -1.5)])
    assert a1111.lora_hashes(values) == {
        name: lora_hash(file) for (name, _), (file, _) in zip(loras, files, strict=True)
    }
    assert "Lora" not in values
    # One that the prompt names already has no second tag.
    named = replace(recipe, prompt="a <lora:kohya:1> frog")
    assert [name for name, _ in a1111.loras(read(named)["Prompt"])[1]] == ["kohya", "style v2", "old"]


def test_a_vae_is_named_as_its_file_and_a_folder_is_not_named_to_it():
    values = read(replace(RECIPE, vae="ft mse.safetensors 0123456789"))
    assert (values["VAE"], values["VAE hash"]) == ("ft mse.safetensors", "0123456789")
    assert "VAE" not in read(replace(RECIPE, vae="my-vae"))
    assert "VAE" not in read(RECIPE)


# Samplers and time grids.


def test_the_sampler_is_its_own_where_it_has_one_that_draws_the_picture():
    found = {name: redrawn(replace(RECIPE, sampler=name))[0] for name in SAMPLERS}
    known = {name: label for name, one in SAMPLERS.items() if (label := one.label) in a1111.SAMPLERS}
    assert known.keys() >= {"ddim", "euler", "euler_ancestral", "heun", "lms", "plms", "dpmpp_2m"}
    assert {name: found[name] for name in known} == known
    assert found["ddpm"] == "Euler a"


def test_eta_has_the_name_of_its_sampler():
    options = DrawOptions(eta=0.5)
    ddim, ancestral = (read(replace(RECIPE, sampler=name, options=options)) for name in ("ddim", "euler_ancestral"))
    assert ddim["Eta DDIM"] == ancestral["Eta"] == "0.5" and "Eta" not in ddim and "Eta DDIM" not in ancestral


def distance(schedule: str, ours: torch.Tensor, steps: int) -> float:
    """The mean difference of two grids, in timesteps; infinite for another number of levels."""
    theirs = a1111.SIGMAS[schedule](LEVELS, steps)
    return (LEVELS.timestep(theirs) - ours).abs().mean().item() if len(theirs) == steps else float("inf")


@pytest.mark.parametrize("grid", TIME_GRIDS)
def test_the_schedule_is_the_nearest_that_it_has(grid):
    """In version 1.9 if the name is one of its own, as most of trailing's equals are not. With 25 and 40 steps, which
    divide 1000: otherwise DDIM has one more."""
    assert grid in SCHEDULES, f"name the schedule of A1111 that is nearest to {grid}, in ldm/inference/infotext.py"
    chosen = SCHEDULES[grid]
    version = a1111.SCHEDULES_1_9 if chosen in a1111.SCHEDULES_1_9 else a1111.SCHEDULES_1_10
    assert redrawn(replace(RECIPE, options=DrawOptions(time_grid=grid)), version)[1] == chosen
    for steps in (25, 40):
        ours = PATH.timesteps(time_grid(PATH, steps, grid)[:-1])
        far = {name: distance(name, ours, steps) for name in version}
        assert far[chosen] == min(far.values()), (steps, far)
        assert (far[chosen] < 0.6) == (grid in (*SAME_GRIDS, "leading"))


def test_a_default_grid_is_named_too_and_one_that_it_has_not_is_kept():
    assert redrawn(RECIPE) == ("DPM++ 2M", "SGM Uniform")  # of a picture from before the default was recorded
    assert redrawn(replace(RECIPE, default_grid="karras")) == ("DPM++ 2M", "Karras")
    listed = read(replace(RECIPE, options=DrawOptions(time_grid="1, 0.5, 0")))
    assert (listed["Schedule type"], listed["Time grid"]) == ("SGM Uniform", "1, 0.5, 0")
    assert "Time grid" not in read(RECIPE)


@pytest.mark.parametrize("steps", [1, 8, 20, 30, 999])
def test_sgm_uniform_is_within_a_timestep_of_trailing_and_its_rounding(steps):
    theirs = LEVELS.timestep(a1111.sigmas_of("Euler", "SGM Uniform", LEVELS, steps)[:-1])
    apart = (theirs - PATH.timesteps(time_grid(PATH, steps, "trailing")[:-1])).abs().max()
    assert apart <= (1 if 1000 % steps == 0 else 1.5)


# The whole drawing.


@pytest.mark.parametrize("eta", [None, 0.5])
@pytest.mark.parametrize(
    ("sampler", "grid"),
    [(s, g) for s in ("euler", "euler_ancestral", "ddpm") for g in ("karras", "linear", "trailing")],
)
def test_a_picture_is_drawn_again(sampler, grid, eta):
    """With their noise, levels, start and step, and our network: to rounding, and for trailing to a timestep."""
    if SAMPLERS[sampler].eta is None and eta is not None:
        return
    pipe = TextToImage(stable_diffusion(1), name="tiny", weights_hash="0")
    options = DrawOptions(time_grid=grid, eta=eta)
    steps = 8 if grid != "linear" else 10  # 999 / 9: whole timesteps
    ((_, recipe),) = pipe.draw(
        DrawRequest(prompt="a frog", sampler=sampler, steps=steps, scale=1, seed=3, options=options)
    )
    request = DrawRequest(prompt="a frog", sampler=sampler, steps=steps, scale=1, seed=3, options=options)
    ours = pipe.pixels(request)
    condition = pipe.model.conditioner(["a frog"])
    of_network = pipe.model.denoise_with(pipe.denoiser, condition)

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        t = (LEVELS.timestep(sigma) + 1) / 1000
        return of_network((x / (1 + sigma**2).sqrt()).float(), t)

    with torch.no_grad():
        latents = a1111.draw(denoise, parameters_text(recipe), LEVELS, (1, 4, 8, 8))
        theirs = pipe.model.decode(latents.float())
    assert (theirs - ours).abs().max() < (2e-2 if grid == "trailing" else 1e-4)
