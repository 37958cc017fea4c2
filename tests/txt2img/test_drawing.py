"""The command `txt2img.py`: what it draws, writes and tells."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from helpers.painting import colour, pngs
from PIL import Image

from ldm.inference.contact_sheet import GAP
from ldm.inference.options import DrawOptions
from ldm.inference.recipe import Recipe, read_recipes, software
from ldm.samplers import SAMPLERS, TIME_GRIDS

SCRIPT = Path(__file__).parents[2] / "txt2img.py"


def test_one_prompt_with_all_defaults(command, model):
    code, out, err = command("--prompt", "a red apple")
    assert (code, err) == (0, "")
    assert model.loads == [("model", "auto", "auto")]
    (call,) = model.calls
    seed = call.pop("seed")
    assert 0 <= seed < 2**32
    assert call == {"prompt": "a red apple", "negative_prompt": "", "steps": 30, "scale": 5.0, "sampler": "dpmpp_2m",
                    "n": 4, "height": 16, "width": 16}  # fmt: skip
    assert pngs() == ["grid-0000.png", *(f"samples/0000{i}.png" for i in range(4))]
    files = [str(Path("outputs", "samples", f"0000{i}.png")) for i in range(4)]
    assert out.splitlines() == [
        "loading model",
        f"{software()}, model tiny: a tiny model, sha256 0123456789",
        "attention: explicit",
        '"a red apple"',
        *(f"  seed {seed + i}  {file}" for i, file in enumerate(files)),
        f"sheet {Path('outputs', 'grid-0000.png')}",
    ]
    for i, file in enumerate(files):
        assert read_recipes(Path(file)) == [
            Recipe(prompt="a red apple", negative_prompt="", steps=30, scale=5.0, sampler="dpmpp_2m", seed=seed + i,
                   width=16, height=16, model="tiny", weights_hash="0123456789", device="real auto",
                   precision="real auto", software=software(), default_grid="trailing")
        ]  # fmt: skip
        with Image.open(file) as image:
            assert image.getpixel((0, 0)) == colour("a red apple", seed + i)
            assert image.info["parameters"] == (
                "a red apple\nSteps: 30, Sampler: DPM++ 2M, Schedule type: SGM Uniform, CFG scale: 5, "
                f"Seed: {seed + i}, Size: 16x16, Model hash: 0123456789, Model: tiny, RNG: CPU, "
                f"SGM noise multiplier: True, Version: {software()}"
            )


def test_the_real_defaults_are_those_of_the_real_model(txt2img):
    assert txt2img.build_parser().parse_args([]).ckpt == SCRIPT.parent / "weights" / "emoji64"


def test_a_random_seed_is_another_each_time(command, model):
    for _ in range(2):
        command("--prompt", "a", "--prompt", "b")
    seeds = [call["seed"] for call in model.calls]
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


ALL_OPTIONS = {
    "--ckpt": ["--model"],
    "--prompt": [],
    "--negative-prompt": ["--neg", "--negative_prompt"],
    "--steps": ["--ddim_steps", "--ddim-steps", "--num-inference-steps", "--num_inference_steps"],
    "--scale": ["--cfg", "--cfg-scale", "--cfg_scale", "--guidance-scale", "--guidance_scale"],
    "--sampler": ["--scheduler"],
    "--seed": [],
    "--n-samples": ["--n_samples", "--batch-size", "--batch_size"],
    "--n-iter": ["--n_iter", "--images-per-prompt", "--images_per_prompt"],
    "--H": ["--height"],
    "--W": ["--width"],
    "--outdir": ["--output"],
    "--precision": ["--dtype"],
    "--device": [],
    "--n-rows": ["--n_rows"],
    "--eta": ["--ddim_eta", "--ddim-eta"],
    "--time-grid": ["--time_grid", "--schedule-type", "--schedule_type"],
    "--guidance-interval": ["--guidance_interval"],
    "--guidance-schedule": ["--guidance_schedule"],
    "--guidance-parallel": ["--guidance_parallel"],
    "--guidance-norm-limit": ["--guidance_norm_limit"],
    "--guidance-momentum": ["--guidance_momentum"],
}
VALUES = {
    "--ckpt": "model", "--prompt": "a_--b", "--negative-prompt": "n_o", "--steps": "7", "--scale": "0",
    "--sampler": "ddim", "--seed": "9", "--n-samples": "2", "--n-iter": "3", "--H": "24", "--W": "8",
    "--outdir": "o_u/t", "--precision": "bf16", "--device": "cpu", "--n-rows": "3", "--eta": "0.5",
    "--time-grid": "karras", "--guidance-interval": "0.2 0.8", "--guidance-schedule": "linear",
    "--guidance-parallel": "0.25", "--guidance-norm-limit": "7", "--guidance-momentum": "-0.5",
}  # fmt: skip
OPTIONS = DrawOptions(
    eta=0.5, time_grid="karras", guidance_interval=(0.2, 0.8), guidance_schedule="linear", guidance_parallel=0.25,
    guidance_norm_limit=7.0, guidance_momentum=-0.5,
)  # fmt: skip


def words_of(option: str, value: str, *, joined: bool = False) -> list[str]:
    return [f"{option}={value}"] if joined and " " not in value else [option, *value.split()]


def check_all_options(model) -> None:
    assert model.loads == [("model", "cpu", "bf16")]
    assert model.calls == [
        {"prompt": "a_--b", "negative_prompt": "n_o", "steps": 7, "scale": 0.0, "sampler": "ddim", "seed": seed,
         "n": 2, "height": 24, "width": 8, "options": OPTIONS}
        for seed in (9, 11, 13)
    ]  # fmt: skip
    assert pngs("o_u/t") == ["grid-0000.png", *(f"samples/0000{i}.png" for i in range(6))]
    (recipe,) = read_recipes(Path("o_u/t/samples/00005.png"))
    assert recipe.options == OPTIONS
    assert (recipe.seed, recipe.device, recipe.precision, recipe.scale) == (14, "real cpu", "real bf16", 0.0)
    with Image.open("o_u/t/grid-0000.png") as grid:
        assert grid.size == (3 * (8 + GAP) + GAP, 2 * (24 + GAP) + GAP)


@pytest.mark.parametrize("joined", [False, True])
def test_every_option_does_something(command, model, joined):
    words = [word for item in VALUES.items() for word in words_of(*item, joined=joined)]
    assert command(*words)[0] == 0
    check_all_options(model)


@pytest.mark.parametrize(("name", "alias"), [(name, alias) for name, found in ALL_OPTIONS.items() for alias in found])
def test_aliases(command, model, name, alias):
    words = [word for key, value in VALUES.items() for word in words_of(alias if key == name else key, value)]
    assert command(*words)[0] == 0
    check_all_options(model)


@pytest.mark.parametrize("word", ["--skip-grid", "--skip_grid", "--skip-save", "--skip_save"])
def test_skipping(command, word):
    code, out, _ = command("--prompt", "x", "--seed", "5", word)
    assert code == 0
    samples = [f"samples/0000{i}.png" for i in range(4)]
    assert pngs() == (samples if "grid" in word else ["grid-0000.png"])
    assert "seed 8" in out
    assert ("sheet" in out) == ("save" in word)


def test_nothing_is_written_if_both_are_skipped(command, model):
    assert command("--prompt", "x", "--skip-grid", "--skip-save")[0] == 0
    assert len(model.calls) == 1
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("word", "dtype"), [("auto", "auto"), ("fp32", "fp32"), ("full", "fp32"), ("bf16", "bf16"), ("autocast", "bf16")]
)
def test_precision(command, model, word, dtype):
    assert command("--prompt", "x", "--precision", word)[0] == 0
    assert model.loads[0][2] == dtype


@pytest.mark.parametrize(
    ("name", "word"), [(name, word) for name in SAMPLERS for word in (name, name.upper(), SAMPLERS[name].label)]
)
def test_every_sampler_by_name_and_label(command, model, name, word):
    assert command("--prompt", "x", "--sampler", word)[0] == 0
    assert model.calls[0]["sampler"] == name
    (recipe,) = read_recipes(Path("outputs/samples/00000.png"))
    assert recipe.sampler == name


@pytest.mark.parametrize(
    "names", [[f"{key} ({one.note})" if one.note else key for key, one in SAMPLERS.items()], TIME_GRIDS]
)
def test_help_lists_what_there_is(txt2img, names):
    assert f"one of {', '.join(names)}, or" in " ".join(txt2img.build_parser().format_help().split())


@pytest.mark.parametrize(
    ("words", "sampler", "grid"),
    [
        (("--sampler", "DPM++ 2M SDE Karras"), "dpmpp_2m_sde", "karras"),
        (("--sampler", "Euler a", "--schedule-type", "SGM Uniform"), "euler_ancestral", "sgm_uniform"),
        (("--sampler", "DPM++ 3M SDE", "--schedule-type", "Automatic"), "dpmpp_3m_sde", "exponential"),
        (("--sampler", "DPM2 a Karras", "--time-grid", "karras"), "dpm2_ancestral", "karras"),
        (("--from-file", "p.txt"), "dpmpp_2m", "karras"),
    ],
)
def test_a_sampler_and_its_grid_in_one_name(command, model, words, sampler, grid):
    Path("p.txt").write_text('an apple --sampler_name "DPM++ 2M Karras"\n')
    assert command(*(() if "--from-file" in words else ("--prompt", "x")), *words)[0] == 0
    assert model.calls[0]["sampler"] == sampler and model.calls[0]["options"] == DrawOptions(time_grid=grid)
    (recipe,) = read_recipes(Path("outputs/samples/00000.png"))
    assert (recipe.sampler, recipe.options.time_grid) == (sampler, grid)


def test_a_grid_against_the_samplers_own_is_one_line(command):
    code, _, err = command("--prompt", "x", "--sampler", "DPM++ 2M Karras", "--time-grid", "exponential")
    told = "names the time grid karras, but the time grid is exponential: leave out one"
    assert (code, err) == (2, f"error: sampler 'DPM++ 2M Karras' {told}\n")


def test_times_may_be_given_and_tell_the_steps(command, model):
    assert command("--prompt", "x", "--time-grid", "1,0.5,0.2,0", "--guidance-rescale", "0.7")[0] == 0
    assert model.calls[0]["steps"] == 3
    assert model.calls[0]["options"] == DrawOptions(time_grid="1,0.5,0.2,0", guidance_rescale=0.7)
    with Image.open("outputs/samples/00000.png") as image:
        assert "SGM noise multiplier: True, Guidance rescale: 0.7, Version" in image.info["parameters"]
        assert 'Time grid: "1,0.5,0.2,0"' in image.info["parameters"]


def test_nothing_is_overwritten_and_the_grid_has_a_row_for_each_prompt(command):
    words = ("--prompt", "a", "--prompt", "b", "--seed", "3", "--n-samples", "3")
    assert command(*words)[0] == 0
    before = {name: Path("outputs", name).read_bytes() for name in pngs()}
    assert command(*words)[0] == 0
    assert pngs() == ["grid-0000.png", "grid-0001.png", *(f"samples/{i:05d}.png" for i in range(12))]
    for name, content in before.items():
        assert Path("outputs", name).read_bytes() == content
    assert before["samples/00000.png"] == Path("outputs/samples/00006.png").read_bytes()
    with Image.open("outputs/grid-0001.png") as grid:
        step = 16 + GAP
        assert grid.size == (3 * step + GAP, 2 * step + GAP)
        for row, prompt in enumerate("ab"):
            for column in range(3):
                pixel = grid.getpixel((GAP + 8 + column * step, GAP + 8 + row * step))
                assert pixel == colour(prompt, 3 + column)
    recipes = read_recipes(Path("outputs/grid-0001.png"))
    assert [(recipe.prompt, recipe.seed) for recipe in recipes] == [(p, s) for p in "ab" for s in (3, 4, 5)]


def test_sheets_are_split_by_size_and_weight(command, monkeypatch):
    Path("p.txt").write_text("a\nb --w 24\nc --w 24\nd --w 24\n")
    monkeypatch.setattr("ldm.inference.contact_sheet.MAX_SHEET_PIXELS", 2 * 24 * 16)
    assert command("--from-file", "p.txt", "--n-samples", "1", "--seed", "0")[0] == 0
    shown = [[recipe.prompt for recipe in read_recipes(path)] for path in sorted(Path("outputs").glob("grid*"))]
    assert shown == [["a"], ["b", "c"], ["d"]]


def test_prompt_file_lines_override_the_command_line(command, model):
    Path("p.txt").write_text(
        '# list\nplain\n\na --n no --w 24 --h 8 --s 5 --d 70 --l 1.5 --sampler_name "ddpm"\nr --d -1\n'
    )
    code, _, err = command(
        "--prompt", "first", "--prompts", "p.txt", "--steps", "9", "--seed", "4", "--neg", "bad", "--n-iter=2"
    )
    assert (code, err) == (0, "")
    size = {"n": 4, "height": 16, "width": 16}
    plain = {"negative_prompt": "bad", "steps": 9, "scale": 5.0, "sampler": "dpmpp_2m"} | size
    line = {"negative_prompt": "no", "steps": 5, "scale": 1.5, "sampler": "ddpm"} | size | {"height": 8, "width": 24}
    assert model.calls[:6] == [
        {"prompt": "first", "seed": 4} | plain,
        {"prompt": "first", "seed": 8} | plain,
        {"prompt": "plain", "seed": 4} | plain,
        {"prompt": "plain", "seed": 8} | plain,
        {"prompt": "a", "seed": 70} | line,
        {"prompt": "a", "seed": 74} | line,
    ]
    assert model.calls[6]["seed"] != 4
    assert model.calls[7]["seed"] == model.calls[6]["seed"] + 4


@pytest.mark.parametrize(
    "prompt",
    ["", " ", "👩\u200d🚀 é", "a, b: c\nNegative prompt: d", "--x y", "a" * 10_000, "%s {} $(id) ../x\x1b[31m"],
)
def test_odd_prompts(command, model, prompt):
    code, out, _ = command(f"--prompt={prompt}", "--neg=" + prompt, "--n-samples=1")
    assert code == 0
    assert model.calls[0]["prompt"] == prompt
    (recipe,) = read_recipes(Path("outputs/samples/00000.png"))
    assert recipe.prompt == recipe.negative_prompt == prompt
    assert len(out.splitlines()) == 6
    assert "\x1b" not in out


def test_a_terminal_that_cannot_show_the_prompt(command, monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert command("--prompt", "é 🍎")[0] == 0
    stdout.seek(0)
    assert r'"\xe9 \U0001f34e"' in stdout.read()


@pytest.mark.parametrize("seed", [0, 2**32, 2**63 - 4])
def test_seeds(command, model, seed):
    assert command("--prompt", "x", "--seed", str(seed))[0] == 0
    assert model.calls[0]["seed"] == seed


def test_progress_only_where_somebody_watches(command, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("tqdm.std.time", iter(range(10**6)).__next__)  # each look at the clock is a second later
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert command("--prompt", "a", "--prompt", "b", "--n-iter", "2", "--steps", "10")[0] == 0
    assert "40/40" in terminal.getvalue()
    plain = io.StringIO()
    monkeypatch.setattr(sys, "stderr", plain)
    assert command("--prompt", "a")[0] == 0
    assert plain.getvalue() == ""
