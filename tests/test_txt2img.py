"""The command `txt2img.py`, with a model that paints each picture in one colour instead of drawing it."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
import types
import zlib
from pathlib import Path

import pytest
from PIL import Image

from ldm.commands import OneLineParser, hyphenated, run_command, training_arguments
from ldm.diffusion import RectifiedFlowPath, ScaledLinearBetaPath
from ldm.grids import GAP
from ldm.interop.files import write_json
from ldm.interop.scheduler import scheduler_config_json
from ldm.options import PLAIN, DrawOptions
from ldm.png import Recipe, read_recipes, software
from ldm.samplers import SAMPLERS, TIME_GRIDS

SCRIPT = Path(__file__).parents[1] / "txt2img.py"


@pytest.fixture(scope="module")
def txt2img():
    spec = importlib.util.spec_from_file_location("txt2img_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def colour(prompt: str, seed: int) -> tuple[int, int, int]:
    value = zlib.crc32(f"{prompt} {seed}".encode())
    return value % 256, value // 256 % 256, value // 65536 % 256


class FakeTextToImage:
    """What ldm.pipeline.TextToImage offers; it keeps what it was called with."""

    name, weights_hash, native_size, factor, attention = "tiny", "0123456789", 16, 8, "attention: explicit"
    device: str
    precision: str
    loads: list[tuple]
    calls: list[dict]

    @classmethod
    def load(cls, path, *, device="auto", dtype="auto"):
        cls.loads.append((str(path), device, dtype))
        if "broken" in str(path):
            raise ValueError(f"{path} holds\nno model")
        fake = cls()
        fake.device, fake.precision = f"real {device}", f"real {dtype}"
        return fake

    def __call__(self, prompt, *, negative_prompt="", steps=30, scale=5.0, sampler="dpmpp_2m", seed=0, n=1,
                 height=None, width=None, options=PLAIN, progress=None):  # fmt: skip
        self.calls.append(
            {"prompt": prompt, "negative_prompt": negative_prompt, "steps": steps, "scale": scale, "sampler": sampler,
             "seed": seed, "n": n, "height": height, "width": width}
            | ({"options": options} if options != PLAIN else {})
        )  # fmt: skip
        if prompt == "interrupt":
            raise KeyboardInterrupt
        assert progress is not None
        for done in range(2 * steps):  # in two rounds
            progress(done + 1, 2 * steps)
        return [Image.new("RGB", (width or 16, height or 16), colour(prompt, seed + i)) for i in range(n)]

    def cut_off(self, prompt):
        return prompt[20:]


@pytest.fixture
def model(monkeypatch, tmp_path):
    """The fake model's class, in the place of the real one; and a folder to work in, with a model path."""
    fake = type("TextToImage", (FakeTextToImage,), {"loads": [], "calls": []})
    module = types.ModuleType("ldm.pipeline")
    module.TextToImage = fake  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "ldm.pipeline", module)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "broken").mkdir()
    return fake


@pytest.fixture
def command(txt2img, model, capsys):
    """Runs the command with these words; returns (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = run_command(txt2img.main, txt2img.build_parser(), hyphenated(["--ckpt=model", *words]))
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    return run


def pngs(folder: str = "outputs") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())


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
        f"{software()}, model tiny (0123456789), attention: explicit",
        '"a red apple"',
        *(f"  seed {seed + i}  {file}" for i, file in enumerate(files)),
        f"sheet {Path('outputs', 'grid-0000.png')}",
    ]
    for i, file in enumerate(files):
        assert read_recipes(Path(file)) == [
            Recipe(prompt="a red apple", negative_prompt="", steps=30, scale=5.0, sampler="dpmpp_2m", seed=seed + i,
                   width=16, height=16, model="tiny", weights_hash="0123456789", device="real auto",
                   precision="real auto", software=software())
        ]  # fmt: skip
        with Image.open(file) as image:
            assert image.getpixel((0, 0)) == colour("a red apple", seed + i)
            assert image.info["parameters"] == (
                f"a red apple\nSteps: 30, Sampler: DPM++ 2M, CFG scale: 5, Seed: {seed + i}, Size: 16x16, "
                f"Model hash: 0123456789, Model: tiny, Version: {software()}"
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


@pytest.mark.parametrize(("names", "table"), [("SAMPLER_NAMES", SAMPLERS), ("GRID_NAMES", TIME_GRIDS)])
def test_help_lists_what_there_is(txt2img, names, table):
    assert getattr(txt2img, names).split(", ") == list(table)
    assert getattr(txt2img, names) in " ".join(txt2img.build_parser().format_help().split())


def test_times_may_be_given_and_tell_the_steps(command, model):
    assert command("--prompt", "x", "--time-grid", "1,0.5,0.2,0", "--guidance-rescale", "0.7")[0] == 0
    assert model.calls[0]["steps"] == 3
    assert model.calls[0]["options"] == DrawOptions(time_grid="1,0.5,0.2,0", guidance_rescale=0.7)
    with Image.open("outputs/samples/00000.png") as image:
        assert 'Schedule type: "1,0.5,0.2,0", Guidance rescale: 0.7, Version' in image.info["parameters"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--time-grid leading", "grid 'leading' counts the entries of a table, and path rectified_flow has none"),
        ("--time-grid karas", "no time grid 'karas', did you mean karras? There are trailing, linear"),
        ("--time-grid 1,0.5,0 --steps 7", "the time grid has 3 times, expected one more than steps, 7"),
        ("--sampler ddpm_learned", "sampler ddpm_learned needs a network that has learned its variance: use ddpm"),
        ("--time-grid 1,0.5,0 --from-file p.txt", "p.txt, line 2: the time grid has 3 times, expected one more"),
    ],
)
def test_what_the_model_cannot_serve_is_told_before_it_is_loaded(command, model, some_model, words, message):
    Path("p.txt").write_text("a\nb --s 5\n")
    code, _, err = command("--ckpt", str(some_model("rectified_flow")), "--prompt", "x", *words.split())
    assert (code, err.count("\n"), model.loads) == (2, 1, [])
    assert err.startswith("error: ") and message in err


def test_a_model_that_has_learned_its_variance_draws_with_it(command, some_model):
    assert command("--ckpt", str(some_model("learned")), "--prompt", "x", "--sampler", "ddpm_learned")[0] == 0


@pytest.fixture
def some_model(tmp_path):
    """The two small files of a model that are read before it is loaded."""

    def write(kind: str) -> Path:
        folder = tmp_path / kind
        flow = kind == "rectified_flow"
        path, prediction = (RectifiedFlowPath(), "velocity") if flow else (ScaledLinearBetaPath(), "eps")
        for part in ("scheduler", "transformer"):
            (folder / part).mkdir(parents=True)
        write_json(scheduler_config_json(path, prediction), folder / "scheduler" / "scheduler_config.json")
        write_json({"in_channels": 4, "out_channels": 4 if flow else 8}, folder / "transformer" / "config.json")
        return folder

    return write


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


def test_sheets_are_split_by_size_and_weight(command, txt2img, monkeypatch):
    Path("p.txt").write_text("a\nb --w 24\nc --w 24\nd --w 24\n")
    monkeypatch.setattr(txt2img, "MAX_SHEET_PIXELS", 2 * 24 * 16)
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


def test_what_the_model_does_not_read_is_told_once(command):
    long = "12345678901234567890 and\nthe rest"
    code, _, err = command("--prompt", long, "--prompt", "short", "--neg", long + "!")
    assert code == 0
    begin = "warning: a prompt is too long for the model, which will not see its end:  and\\nthe rest"
    assert err.splitlines() == [begin, begin + "!"]


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
    assert len(out.splitlines()) == 5
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


BAD = [
    ([], 'nothing to draw: give a prompt, as in --prompt "a red apple"'),
    (["a cat"], "unrecognized arguments: a cat"),
    *((["--prompt", "x", *words.split()], message) for words, message in [
        ("--steps 0", "steps is 0, expected 1 to 1000"),
        ("--steps -1", "steps is -1, expected 1 to 1000"),
        ("--steps 1001", "steps is 1001, expected 1 to 1000"),
        ("--ddim_steps 20.5", "--steps: invalid int value: '20.5'"),
        ("--steps", "--steps: expected one argument"),
        ("--stesp 5", "unknown option --stesp, did you mean --steps?"),
        ("--fixed_code", "unknown option --fixed-code, --help lists all"),
        ("--step 5", "unknown option --step, did you mean --steps?"),
        ("--scale -1", "scale is -1.0, expected a number from 0"),
        ("--scale nan", "scale is nan, expected a number from 0"),
        ("--scale inf", "scale is inf, expected a number from 0"),
        ("--scale high", "--scale: invalid float value: 'high'"),
        ("--seed -2", "seed is -2, expected -1 to 9223372036854775807"),
        ("--seed 9223372036854775808", "seed is 9223372036854775808, expected -1 to"),
        ("--seed 9223372036854775807", "last picture's would be 9223372036854775810, above 9223372036854775807"),
        ("--seed random", "--seed: invalid int value: 'random'"),
        ("--n-samples 0", "--n-samples is 0, expected 1 to 256"),
        ("--n-samples 257", "--n-samples is 257, expected 1 to 256"),
        ("--n-iter 0", "--n-iter is 0, expected 1 to 10000"),
        ("--n-iter 10001", "--n-iter is 10001, expected 1 to 10000"),
        ("--n-rows -1", "--n-rows is -1, expected 0 to 256"),
        ("--n-rows 257", "--n-rows is 257, expected 0 to 256"),
        ("--H 0", "height is 0, expected 1 to 4096"),
        ("--W -8", "width is -8, expected 1 to 4096"),
        ("--W 4104", "width is 4104, expected 1 to 4096"),
        ("--H 512px", "--H: invalid int value: '512px'"),
        ("--eta 0.5", "sampler DPM++ 2M has no eta: leave it out, or use ddim, euler_ancestral"),
        ("--eta 2 --sampler ddim", "eta is 2.0, expected 0 to 1"),
        ("--guidance-rescale 1.5", "guidance rescale is 1.5, expected 0 to 1"),
        ("--guidance-rescale 0.5 --guidance-parallel 0", "use one of them"),
        ("--guidance-interval 0.5", "--guidance-interval: expected 2 arguments"),
        ("--guidance-interval 0.9 0.2", "the guidance interval is 0.9 to 0.2, expected 0 <= start <= stop <= 1"),
        ("--guidance-schedule up", "no guidance schedule 'up': There are constant, linear, cosine"),
        ("--time-grid 0,1", "the time grid is 0, 1, expected two or more times that fall from at most 1 to 0"),
        ("--precision fp16", "--precision: invalid choice: 'fp16'"),
        ("--sampler dpmp_2m", "no sampler 'dpmp_2m', did you mean dpmpp_2m? There are ddpm, ddpm_large, "),
        ("--sampler xyz", "no sampler 'xyz': There are ddpm, ddpm_large, "),
        ("--ckpt missing", "there is no model at missing"),
        ("--from-file missing.txt", "there is no prompt file missing.txt"),
        ("--from-file model", "model is not a plain file"),
        ("--outdir file", "pictures cannot go to file, for "),
        ("--outdir file/below/it", "pictures cannot go to file/below/it, for "),
        ("--outdir half", "half/samples is not a folder"),
    ]),
    (["--prompt", "\udcff"], "the prompt holds a zero byte or bytes that are not UTF-8"),
    (["--prompt", "x" * 10_001], "the prompt has 10001 characters, expected at most 10000"),
    (["--from-file", "bad.txt"], "bad.txt, line 3: steps is 0, expected 1 to 1000"),
    (["--from-file", "bad.txt", "--neg", "\0"], "the negative prompt holds a zero byte"),
    (["--from-file", "sampler.txt"], "sampler.txt, line 2: no sampler 'eular', did you mean euler?"),
    (["--from-file", "seed.txt"], "seed.txt, line 1: seed is 9223372036854775806, so that the last"),
    (["--from-file", "empty.txt"], "empty.txt holds no prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda value: "")
def test_mistakes_are_told_in_one_line_before_the_model_is_loaded(command, model, words, message):
    Path("file").touch()
    Path("half").mkdir()
    Path("half/samples").touch()
    Path("bad.txt").write_text("a\n\nb --s 0\n")
    Path("sampler.txt").write_text("a\nb --sampler_name eular\n")
    Path("seed.txt").write_text(f"a --d {2**63 - 2}\n")
    Path("empty.txt").touch()
    files = sorted(Path().rglob("*"))
    code, out, err = command(*words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("error: ")
    assert message in err
    assert model.loads == []
    assert sorted(Path().rglob("*")) == files


def test_a_folder_that_may_not_be_written_to(command, model, monkeypatch):
    # Root may write everywhere, so the answer of the system is replaced.
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and Path(path).name == "locked"))
    Path("locked").mkdir()
    code, _, err = command("--prompt", "x", "--outdir", "locked/below")
    assert (code, err.count("\n"), model.loads) == (2, 1, [])
    assert "locked may not be written to" in err
    assert command("--prompt", "x", "--outdir", "open/below")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ckpt", "broken"], "error: broken holds no model\n"),
        (["--H", "20"], "error: height is 20, expected a multiple of 8, as 16 or 24\n"),
        (["--W", "7"], "error: width is 7, expected a multiple of 8, as 8\n"),
        (["--from-file", "p.txt"], "error: p.txt, line 2: width is 20, expected a multiple of 8, as 16 or 24\n"),
    ],
)
def test_mistakes_that_need_the_model_are_told_before_it_draws(command, model, words, message):
    Path("p.txt").write_text("a\nb --w 20\n")
    code, _, err = command("--prompt", "x", *words)
    assert (code, err) == (2, message)
    assert model.calls == []
    assert not Path("outputs").exists()


def test_debug_shows_the_traceback(command):
    with pytest.raises(ValueError, match="no model"):
        command("--prompt", "x", "--ckpt", "broken", "--debug")
    with pytest.raises(KeyboardInterrupt):
        command("--prompt", "interrupt", "--debug")


def test_an_interrupted_run_keeps_what_it_drew(command):
    code, _, err = command("--prompt", "x", "--prompt", "interrupt", "--n-samples", "2")
    assert (code, err) == (130, "error: interrupted\n")
    assert pngs() == ["samples/00000.png", "samples/00001.png"]


def test_a_disk_error_is_one_line(command, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "x.png")

    monkeypatch.setattr("ldm.png.NumberedFiles.write", full)
    code, _, err = command("--prompt", "x")
    assert (code, err) == (2, "error: [Errno 28] No space left on device: 'x.png'\n")


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


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--prompt", "x", "--steps", "0"], 2), ([], 2)])
def test_quick_answers_import_nothing_heavy(words, code):
    python = [sys.executable, "-X", "importtime"]
    result = subprocess.run([*python, SCRIPT, *words], capture_output=True, text=True, check=False, timeout=60)
    lines = result.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert result.returncode == code
    assert "ldm.prompts" in imported
    assert not imported & {"torch", "numpy", "PIL", "tqdm", "transformers", "deepspeed", "pydantic", "yaml"}
    assert sum(not line.startswith("import time:") for line in lines) == (1 if code else 0)


def test_hyphenated_leaves_values_alone():
    words = ["--n_samples", "a_b", "--from_file=a_b", "--a_b c_d", "-a_b", "--", "--_x"]
    assert hyphenated(words) == ["--n-samples", "a_b", "--from-file=a_b", "--a_b c_d", "-a_b", "--", "--_x"]


def test_training_commands_parse_and_fail_as_before(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "c.yaml", "run.steps=3", "--local_rank=1"])

    def fail(args):
        raise FileNotFoundError(json.dumps([args.config, args.overrides, args.local_rank]))

    assert run_command(fail, training_arguments("x")) == 2
    assert capsys.readouterr().err == 'error: ["c.yaml", ["run.steps=3"], 1]\n'

    def bug(args):
        raise TypeError("ours")

    with pytest.raises(TypeError):
        run_command(bug, training_arguments("x"))


def test_options_are_not_abbreviated(capsys):
    parser = OneLineParser("x")
    parser.add_argument("--outdir", "--output")
    with pytest.raises(SystemExit):
        parser.parse_args(["--outd", "x"])
    assert capsys.readouterr().err == "error: unknown option --outd, did you mean --outdir?\n"
