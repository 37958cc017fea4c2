"""The command `txt2img.py`: mistakes, each one line with exit code 2, told before anything heavy is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.painting import pngs

from ldm.denoisers import DiTConfig
from ldm.diffusion import RectifiedFlowPath, ScaledLinearBetaPath
from ldm.files.strict_json import write_json
from ldm.files.writing import WriteError
from ldm.inference.pictures import NumberedFiles
from ldm.inference.recipe import read_recipes
from ldm.interop.diffusers_layout.denoiser import layout_of
from ldm.interop.diffusers_layout.layout import Surroundings
from ldm.interop.diffusers_layout.scheduler import scheduler_config_json

SCRIPT = Path(__file__).parents[2] / "txt2img.py"


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
        ("--scale -1", "scale is -1.0, expected 0 or more"),
        ("--scale nan", "scale is nan, expected 0 or more"),
        ("--scale inf", "scale is inf, expected 0 or more"),
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
        ("--sampler dpmpp_2m --eta 0.5", "sampler DPM++ 2M has no eta: leave it out, or use ddim, euler_ancestral"),
        ("--eta 2 --sampler ddim", "eta is 2.0, expected 0 to 1"),
        ("--guidance-rescale 1.5", "guidance rescale is 1.5, expected 0 to 1"),
        ("--guidance-rescale 0.5 --guidance-parallel 0", "use one of them"),
        ("--guidance-interval 0.5", "--guidance-interval: expected 2 arguments"),
        ("--guidance-interval 0.9 0.2", "the guidance interval is 0.9 to 0.2, expected 0 <= start <= stop <= 1"),
        ("--guidance-schedule up", "no guidance schedule 'up': There are constant, linear, cosine"),
        ("--time-grid 0,1", "the time grid is 0, 1, expected two or more times that fall from at most 1 to 0"),
        ("--precision int8", "--precision: the precision is 'int8', expected fp32 (float32, "),
        ("--sampler dpmp_2m", "no sampler 'dpmp_2m', did you mean dpmpp_2m? There are ddpm, ddpm_large, "),
        ("--sampler xyz", "no sampler 'xyz': There are ddpm, ddpm_large, "),
        ("--ckpt missing", "there is no model at missing"),
        ("--ckpt runs/mine", "there is no model at runs/mine: give the folder or file of one"),
        ("--from-file missing.txt", "missing.txt is missing: give a text file with one prompt per line"),
        ("--from-file model", "model is not a plain file"),
        ("--outdir file", "pictures cannot be written to file: "),
        ("--outdir file/below/it", "pictures cannot be written to file/below/it: "),
        ("--outdir half", "half/samples is not a folder"),
    ]),
    (["--prompt", "\udcff"], "the prompt is '\\udcff', with a zero byte or bytes that are not UTF-8"),
    (["--prompt", "x" * 10_001], "the prompt has 10001 characters, expected at most 10000"),
    (["--from-file", "bad.txt"], "bad.txt, line 3: steps is 0, expected 1 to 1000"),
    (["--from-file", "bad.txt", "--neg", "\0"], "the negative prompt is '\\x00', with a zero byte"),
    (["--from-file", "sampler.txt"], "sampler.txt, line 2: no sampler 'eular', did you mean euler?"),
    (["--from-file", "seed.txt"], "seed.txt, line 1: seed is 9223372036854775806, so that the last"),
    (["--from-file", "empty.txt"], "empty.txt contains no prompt"),
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
    assert "no permission to write to " in err
    assert command("--prompt", "x", "--outdir", "open/below")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ckpt", "broken"], "error: broken holds no model\n"),
        (["--H", "20"], "error: height is 20, expected a multiple of 8: use 16 or 24\n"),
        (["--W", "7"], "error: width is 7, expected a multiple of 8: use 8\n"),
        (["--from-file", "p.txt"], "error: p.txt, line 2: width is 20, expected a multiple of 8: use 16 or 24\n"),
    ],
)
def test_mistakes_that_need_the_model_are_told_before_it_draws(command, model, words, message):
    Path("p.txt").write_text("a\nb --w 20\n")
    code, _, err = command("--prompt", "x", *words)
    assert (code, err) == (2, message)
    assert model.calls == []
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--time-grid leading", "grid 'leading' counts the entries of a table, and path rectified_flow has none"),
        ("--time-grid karas", "no time grid 'karas', did you mean karras? There are trailing, linear"),
        ("--time-grid 1,0.5,0 --steps 7", "the time grid has 3 times, expected one more than steps, 7"),
        ("--sampler ddpm_learned", "sampler DDPM learned needs a network that has learned its variance: use ddpm"),
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
        around = Surroundings(sample_size=8, latent_channels=4, context_width=16, learned_variance=not flow)
        network = DiTConfig(sample_size=8, width=16, depth=1, heads=2)
        write_json(layout_of(network).to_json(network, around), folder / "transformer" / "config.json")
        return folder

    return write


def test_debug_shows_the_traceback(command):
    with pytest.raises(ValueError, match="no model"):
        command("--prompt", "x", "--ckpt", "broken", "--debug")
    with pytest.raises(KeyboardInterrupt):
        command("--prompt", "interrupt", "--debug")


def test_an_interrupted_run_keeps_what_it_drew(command):
    """Its contact sheet, too."""
    code, out, err = command("--prompt", "x", "--prompt", "interrupt", "--n-samples", "2")
    assert (code, err) == (130, "error: interrupted\n")
    assert pngs() == ["grid-0000.png", "samples/00000.png", "samples/00001.png"]
    assert [recipe.seed for recipe in read_recipes(Path("outputs/grid-0000.png"))] == [
        read_recipes(Path(f"outputs/samples/0000{i}.png"))[0].seed for i in range(2)
    ]
    assert out.endswith("sheet outputs/grid-0000.png\n")


def test_one_that_is_interrupted_before_its_first_picture_writes_no_sheet(command):
    assert command("--prompt", "interrupt")[0] == 130
    assert pngs() == []


@pytest.mark.parametrize("rows", ["of one size", "of two sizes"])
def test_a_sheet_that_cannot_be_written_ends_nothing(command, monkeypatch, rows):
    """The pictures are there; without them, the sheet is what was asked for."""
    write, full = NumberedFiles.write, WriteError(28, "No space left on device", "grid-0000.png")

    def on_a_full_disk(self, content):
        if self.prefix:
            raise full
        return write(self, content)

    monkeypatch.setattr(NumberedFiles, "write", on_a_full_disk)
    Path("prompts.txt").write_text("x\ny --w 32 --h 32\n" if rows == "of two sizes" else "x\ny\n")
    code, _, err = command("--from-file", "prompts.txt", "--n-samples", "1")
    said = "grid-0000.png cannot be written (No space left on device): free disk space, or write elsewhere\n"
    assert (code, err) == (0, f"warning: a contact sheet is left out: {said}" * (1 + (rows == "of two sizes")))
    assert pngs() == ["samples/00000.png", "samples/00001.png"]
    assert command("--from-file", "prompts.txt", "--skip-save")[0::2] == (2, f"error: {said}")


def test_a_disk_error_is_one_line(command, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device", "x.png")

    monkeypatch.setattr("ldm.inference.pictures.NumberedFiles.write", full)
    code, _, err = command("--prompt", "x")
    assert (code, err) == (2, "error: [Errno 28] No space left on device: 'x.png'\n")


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--prompt", "x", "--steps", "0"], 2), ([], 2)])
def test_quick_answers_import_nothing_heavy(words, code):
    python = [sys.executable, "-X", "importtime"]
    result = subprocess.run([*python, SCRIPT, *words], capture_output=True, text=True, check=False, timeout=60)
    lines = result.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert result.returncode == code
    assert "ldm.inference.prompt_file" in imported
    assert not imported & {"torch", "numpy", "PIL", "tqdm", "transformers", "deepspeed", "pydantic", "yaml"}
    assert sum(not line.startswith("import time:") for line in lines) == (1 if code else 0)
