"""What an error of a training advises works: each test does what the message says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers.forking import ROOT
from helpers.launching import DIT, IMAGE, TEXT, VAE, denoiser_config, start, write_config

from data.shards import Shard
from data.write import write_shards
from ldm import TextToImage
from ldm.files.checkpoints import Digest, seal
from ldm.interop.read_model import read_text, read_vae

WEIGHTS = ROOT / "weights" / "emoji64"
QUICK = ["run.steps=2", "run.sample_every=9", "preview.steps=1", "preview.pictures=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, few_emoji: str) -> Path:
    """A folder with a denoiser of two steps, "dit", on the shipped autoencoder and text encoder."""
    folder = tmp_path_factory.mktemp("remedies")
    denoiser_config(folder, "dit", few_emoji, DIT, vae=str(WEIGHTS), text=str(WEIGHTS))
    assert train(folder, "run.checkpoint_every=1")[0] == 0
    return folder


def train(folder: Path, *words: str, script: str = "ldm/train.py", config: str = "dit") -> tuple[int, str]:
    """Run a training command; returns its exit code and, if it fails, the line of its error, else what it printed."""
    quick = QUICK if config == "dit" else QUICK[:2]
    finished = start([script, "--config", str(folder / f"{config}.yaml"), *quick, *words])
    assert "Traceback" not in finished.stderr, finished.stderr
    errors = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == (finished.returncode != 0), finished.stderr
    return finished.returncode, errors[0] if errors else finished.stdout


def copied(folder: Path, name: str) -> str:
    """A copy of the run "dit"; returns the word that names it."""
    shutil.copytree(folder / "runs" / "dit", folder / "runs" / name, dirs_exist_ok=True)
    return f"run.name={name}"


@pytest.mark.parametrize("remedy", [["optim.lr=0.001"], ["engine.precision=fp32", "optim.lr=0.001"]])
def test_after_losses_that_are_not_finite_the_run_goes_on(folder: Path, remedy: list[str]):
    name = f"nan{len(remedy)}"
    words = [f"run.name={name}", "engine.clip=0", "engine.precision=bf16", "run.checkpoint_every=1", "run.steps=4"]
    code, error = train(folder, *words, "optim.lr=1e30")
    assert code == 6
    assert "with a lower optim.lr and run.allow=[optim.lr], or with engine.precision=fp32 and" in error
    allow = ",".join(word.partition("=")[0] for word in remedy)
    shutil.rmtree(folder / "runs" / name / "checkpoints")  # of the weights that the rate of 1e30 has made
    shutil.copytree(folder / "runs/dit/checkpoints", folder / "runs" / name / "checkpoints")
    code, printed = train(folder, *words, *remedy, f"run.allow=[{allow},engine.precision,engine.clip]")
    assert code == 0, printed
    assert "run.allow" in printed and "resumed from" in printed


@pytest.mark.parametrize("change", ["optim.lr=0.0005", "data.batch_size=4", "optim.optimizer=muon", "data.lanes=1"])
def test_a_run_goes_on_with_another_setting_as_its_error_says(folder: Path, change: str):
    key = change.partition("=")[0]
    name = copied(folder, key.replace(".", "_"))
    code, error = train(folder, name, change, "run.steps=4")
    assert code == 2 and f"allow it with run.allow=[{key}]" in error
    code, printed = train(folder, name, change, "run.steps=4", f"run.allow=[{key}]")
    assert code == 0, printed
    assert f"{key} is " in printed and "from now on" in printed


def test_the_pictures_of_batches_of_two_sizes_are_counted(folder: Path):
    name = copied(folder, "smaller")
    code, _ = train(folder, name, "data.batch_size=4", "run.allow=[data.batch_size]", "run.steps=4")
    assert code == 0
    state = json.loads((folder / "runs/smaller/checkpoints/step_0000004/state.json").read_text())
    assert (state["position"], state["samples_seen"]) == (4, 2 * 8 + 2 * 4)
    code, _ = train(folder, name, "data.batch_size=4", "run.steps=6")
    state = json.loads((folder / "runs/smaller/checkpoints/step_0000006/state.json").read_text())
    assert (code, state["samples_seen"]) == (0, 2 * 8 + 4 * 4)


def test_a_run_goes_on_with_more_pictures(folder: Path):
    (source,) = (ROOT / "data/emoji64/val").glob("*.tar.gz")
    raw = [Shard(source)[index].members for index in range(24)]
    (folder / "more").mkdir()
    samples = [(one["webp"], one["txt"].decode(), json.loads(one["json"])) for one in raw]
    write_shards(samples, folder / "more", shards=3)
    more, name = f"data.shards={folder}/more/*.tar.gz", copied(folder, "more")
    code, error = train(folder, name, more, "run.steps=4")
    assert code == 2 and "allow it with run.allow=[data.shards]" in error
    code, printed = train(folder, name, more, "run.steps=4", "run.allow=[data.shards]")
    assert code == 0, printed
    assert "then 16 samples in 2 shards, now 24 in 3" in printed
    assert train(folder, name, more, "run.steps=5")[0] == 0  # from now on, these are the run's data


def test_another_run_keeps_the_weights_of_one_whose_model_must_stay(folder: Path):
    code, error = train(folder, "model.caption_dropout=0.5", "run.steps=4")
    (word,) = re.findall(r"model\.start=\S+(?=,)", error)
    assert code == 2 and word == f"model.start={folder}/runs/dit"
    code, printed = train(folder, "model.caption_dropout=0.5", "run.name=other_dropout", word)
    assert code == 0 and f"model.start: averaged weights of step 2 of 2 of {folder}/runs/dit" in printed


@pytest.fixture(scope="module")
def parts(folder: Path, few_emoji: str) -> Path:
    """The folder with an autoencoder, "vae", and a text encoder, "clip", of their own kind: stopped after a step."""
    text = TEXT | {"width": 128, "heads": 4}  # as wide as the shipped one
    write_config(folder, "vae", few_emoji, vae=VAE, loss={"perceptual": "none"})
    write_config(folder, "clip", few_emoji, text=text, image=IMAGE)
    for script, config in (("vae/train.py", "vae"), ("text/train.py", "clip")):
        assert train(folder, "run.minutes=0", script=script, config=config)[0] == 0
    return folder


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.vae={}/runs/vae", "autoencoder"),
        ("model.text={}/runs/clip", "text encoder"),
        ("model.objective.prediction=eps model.path={{kind: scaled_linear_beta}}", "prediction"),
    ],
)
def test_a_start_from_weights_of_another_kind_is_refused_unless_allowed(parts: Path, change: str, words: str):
    key, changes = change.partition("=")[0], change.format(parts).split(" ", maxsplit=1)
    begin = [f"run.name=start_{key}", f"model.start={parts}/runs/dit", *changes]
    code, error = train(parts, *begin)
    assert code == 2 and f"with another {words} than that of {key}: set" in error, error
    assert f"allow it with run.allow=[{key}]" in error
    if f"set {key}=" in error:
        (remedy,) = re.findall(rf"set ({key}=\S+),", error)
        assert train(parts, *begin, remedy)[0] == 0
        shutil.rmtree(parts / "runs" / f"start_{key}")
    assert train(parts, *begin, f"run.allow=[{key}]")[0] == 0


def test_a_run_whose_export_was_cut_off_by_a_loss_of_power_is_resumed(parts: Path):
    assert train(parts, "run.name=cut")[0] == 0
    export = parts / "runs/cut/model"
    for file in ("text_encoder/model.safetensors", "vae/config.json"):
        (export / file).write_bytes(b"")
    code, printed = train(parts, "run.name=cut", "run.steps=3")
    assert code == 0 and f"{export} is damaged, so model.vae and model.text are not compared with it" in printed
    assert train(parts, "run.name=cut", "run.steps=4")[1].count("damaged") == 0
    assert (export / "vae/config.json").read_bytes()


def test_an_autoencoder_that_was_trained_on_is_not_swapped_under_a_run(parts: Path):
    shutil.copytree(parts / "runs" / "vae", parts / "runs" / "going_on")
    words = ["run.name=on_it", f"model.vae={parts}/runs/going_on"]
    assert train(parts, *words)[0] == 0
    assert train(parts, *words, "run.steps=3")[0] == 0
    more = ["run.name=going_on", "run.steps=5", "optim.lr=0.1", "run.allow=[optim.lr]"]
    assert train(parts, *more, script="vae/train.py", config="vae")[0] == 0
    code, error = train(parts, *words, "run.steps=4")
    assert code == 2 and "is no longer the autoencoder that this run began with" in error
    remedy = re.findall(r"(model\.vae=\S+) (run\.allow=\S+)$", error)
    code, printed = train(parts, *words, "run.steps=4", *remedy[0])
    assert code == 0, printed


@pytest.mark.parametrize(
    ("script", "config", "right"),
    [("vae/train.py", "dit", "ldm/train.py"), ("ldm/train.py", "vae", "vae/train.py"),
     ("ldm/train.py", "clip", "text/train.py"), ("text/train.py", "vae", "vae/train.py")],
)  # fmt: skip
def test_another_commands_configuration_names_that_command(parts: Path, script: str, config: str, right: str):
    code, error = train(parts, script=script, config=config)
    assert code == 2 and f"so it is for {right}, not for {script}: start {right}, or give" in error
    assert train(parts, f"run.name=right_{config}", script=right, config=config)[0] == 0


def test_an_autoencoder_of_an_older_version_that_was_stopped_is_finished_as_its_error_says(parts: Path):
    """Its checkpoints do not say how large its latents are."""
    shutil.copytree(parts / "runs" / "vae", parts / "runs" / "old")
    (checkpoint,) = (parts / "runs/old/checkpoints").glob("step_*")
    state = json.loads((checkpoint / "state.json").read_text())
    del state["measured"]
    (checkpoint / "state.json").write_text(json.dumps(state))
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint, {path.name: Digest.of(path) for path in checkpoint.iterdir()}, name=checkpoint.name)
    with pytest.raises(ValueError, match="does not record the statistics of the latents") as error:
        read_vae(parts / "runs" / "old", dtype=torch.float32, in_place_of=None)
    (remedy,) = re.findall(r"run\.steps=\d+", str(error.value))
    assert train(parts, "run.name=old", remedy, script="vae/train.py", config="vae")[0] == 0
    vae = read_vae(parts / "runs" / "old", dtype=torch.float32, in_place_of=None)
    assert (parts / "runs/old/vae").is_dir() and vae.config.latent_std is not None


def test_a_run_that_has_saved_nothing_yet_says_so(parts: Path):
    for name in ("vae", "clip"):
        shutil.copytree(parts / "runs" / name, parts / "runs" / f"new_{name}")
        shutil.rmtree(parts / "runs" / f"new_{name}" / "checkpoints")
    with pytest.raises(ValueError, match=r"is a run without a valid checkpoint, and without vae/: start its training"):
        read_vae(parts / "runs/new_vae", dtype=torch.float32, in_place_of=None)
    with pytest.raises(ValueError, match=r"without a valid checkpoint, and without text_encoder/: start its"):
        read_text(parts / "runs/new_clip", dtype=torch.float32)
    assert train(parts, "run.name=new_vae", "run.minutes=0", script="vae/train.py", config="vae")[0] == 0
    read_vae(parts / "runs/new_vae", dtype=torch.float32, in_place_of=None)


def test_a_run_that_is_no_model_says_where_it_is_given(parts: Path):
    with pytest.raises(ValueError, match=r"is a training of an autoencoder, .*: give it with --vae, beside a model"):
        TextToImage.load(parts / "runs" / "vae")
    with pytest.raises(ValueError, match=r"is a training of a text encoder, .*: give it with --text, beside a model"):
        TextToImage.load(parts / "runs" / "clip")
    pipe = TextToImage.load(WEIGHTS, vae=parts / "runs" / "vae", text=parts / "runs" / "clip")
    assert "autoencoder of vae (averaged weights of step 1 of 2)" in pipe.description
    assert "text encoder of clip (averaged weights of step 1 of 2)" in pipe.description
    assert pipe("x", steps=1)[0].size == (64, 64)


def test_an_average_of_steps_that_are_past_is_begun_in_another_run(folder: Path):
    """No permission helps: nothing has averaged the steps until now."""
    for words in ([], ["run.allow=[optim.ema_lengths]"]):
        code, error = train(folder, "optim.ema_lengths=[0.1]", "run.steps=4", *words)
        assert code == 2 and "run.allow" not in error
    (word,) = re.findall(r"model\.start=\S+(?=,)", error)
    assert train(folder, "optim.ema_lengths=[0.1]", "run.name=averaged", word)[0] == 0


def test_each_word_of_the_lines_is_explained(parts: Path):
    """And a line says where; the first and the last sheet, which may take a while, are announced."""
    page = (ROOT / "docs" / "training.md").read_text()
    explained = page[page.index("## What a run prints") : page.index("## Your own pictures")]
    for script, config in (("ldm/train.py", "dit"), ("vae/train.py", "vae"), ("text/train.py", "clip")):
        words = [f"run.name=words_{config}", "run.log_every=1"]
        code, printed = train(parts, *words, script=script, config=config)
        assert code == 0 and "docs/training.md explains what the lines below say" in printed
        assert "step 0: evaluating and drawing\n" in printed
        assert re.search(r"^step 2: evaluating and drawing, about 0:\d\d:\d\d$", printed, re.MULTILINE)
        (line,) = re.findall(r"^step 2/2  (.*)$", printed, re.MULTILINE)
        names = re.findall(r"([a-z]\w*) [\d.]", line) + ["images/s", "ETA"]
        assert {"loss", "lr"} < set(names)
        assert not [
            name for name in names if name not in ("data", "loss_q2", "loss_q3") and f"`{name}`" not in explained
        ]
