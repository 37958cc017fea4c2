"""The commands of the README, from the launch to the files they leave, on tiny networks and shards."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from helpers.launching import DIT, IMAGE, TEXT, UNET, VAE, denoiser_config, losses, start, write_config
from helpers.shard_zoo import packed
from safetensors.torch import load_file

from data.shards import Shard
from ldm import TextToImage
from ldm.diffusion import EDMPath
from ldm.files.atomic import lock_folder


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory, few_emoji: str) -> Path:
    """A folder in which an autoencoder, a CLIP and a denoiser were trained for ten steps, by plain python."""
    folder = tmp_path_factory.mktemp("workshop")
    loss = {"perceptual": "none"}
    commands = {
        "vae/train.py": write_config(folder, "vae", few_emoji, vae=VAE, loss=loss),
        "text/train.py": write_config(folder, "clip", few_emoji, text=TEXT, image=IMAGE),
        "ldm/train.py": denoiser_config(folder, "dit", few_emoji, DIT),
    }
    for script, config in commands.items():
        finished = start([script, "--config", config])
        assert finished.returncode == 0, finished.stdout + finished.stderr
        assert "Traceback" not in finished.stderr
    return folder


def test_training_leaves_what_it_promises(workshop):
    runs = workshop / "runs"
    assert {path.name for path in (runs / "vae" / "vae").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
    }
    statistics = json.loads((runs / "vae" / "vae" / "config.json").read_text())
    assert len(statistics["latents_mean"]) == len(statistics["latents_std"]) == 4
    assert (runs / "clip" / "text_encoder" / "model.safetensors").exists()
    assert (runs / "clip" / "tokenizer" / "vocab.json").exists()
    for step in (0, 5, 10):
        assert (runs / "dit" / "samples" / f"step_{step:07d}.png").exists()
    assert len(losses(workshop, "dit")) == 10
    checkpoints = runs / "dit" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step_0000005", "step_0000010", "latest"}
    assert (checkpoints / "latest").read_text() == "step_0000010\n"
    assert not list(runs.glob("**/*.partial"))


def test_what_was_trained_draws(workshop):
    pipe = TextToImage.load(workshop / "runs" / "dit" / "model")
    assert pipe("a red apple", steps=2, n=2)[1].size == (64, 64)


def test_training_begins_with_the_weights_of_another_run(workshop):
    words = ["run.name=second", "run.steps=1", f"model.start={workshop / 'runs/dit'}", "optim.lr=1e-9"]
    finished = start(["ldm/train.py", "--config", str(workshop / "dit.yaml"), *words])
    assert finished.returncode == 0, finished.stderr

    def held_out(name: str) -> list[float]:
        lines = (workshop / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [record["held_out_loss"] for record in map(json.loads, lines) if "held_out_loss" in record]

    assert held_out("second") == pytest.approx([held_out("dit")[-1]] * 2, abs=1e-4)
    assert held_out("dit")[0] != pytest.approx(held_out("dit")[-1], abs=1e-3)


def test_every_part_of_the_objective_trains(workshop):
    """On EDM's path, with its times and prediction, a weight, and more noise than the target knows."""
    objective = {
        "prediction": "edm",
        "time_sampling": "log_normal",
        "time_numbers": "stratified",
        "weighting": "soft_min_snr",
        "offset_noise": 0.1,
        "input_perturbation": 0.1,
    }
    words = [f"model.objective.{key}={value}" for key, value in objective.items()]
    words += ["run.name=edm", "run.steps=2", "model.path={kind: edm, sigma_data: 1.0}"]
    finished = start(["ldm/train.py", "--config", str(workshop / "dit.yaml"), *words])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert all(0 < loss < 100 for loss in losses(workshop, "edm"))
    pipe = TextToImage.load(workshop / "runs" / "edm")
    assert (pipe.model.path, pipe.model.prediction) == (EDMPath(sigma_data=1.0), "edm")
    assert pipe("a red apple", steps=3)[0].size == (64, 64)


@pytest.fixture(scope="module")
def remembering(workshop: Path, few_emoji: str) -> list[str]:
    """Times by importance, a learned variance, snapshots of averages; its run "remembered" is complete."""
    objective = {"prediction": "eps", "time_sampling": "importance", "learned_variance": True}
    path = {"kind": "scaled_linear_beta"}
    config = denoiser_config(workshop, "remembering", few_emoji, DIT, path=path, objective=objective)
    words = ["ldm/train.py", "--config", config, "optim.ema_lengths=[0.05,0.1]", "run.snapshot_every=4"]
    finished = start([*words, "run.name=remembered"])
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return words


def test_a_network_learns_its_variance_and_draws_with_it(workshop, remembering):
    pipe = TextToImage.load(workshop / "runs" / "remembered")
    assert pipe.denoiser.learned_variance
    assert pipe("a red apple", steps=3, sampler="ddpm_learned")[0].size == (64, 64)
    lines = (workshop / "runs/remembered/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    quarters = {f"loss_q{i}" for i in range(1, 5)}
    assert all(quarters & record.keys() for record in records if "loss" in record)
    assert all({f"held_out_{name}" for name in quarters} <= r.keys() for r in records if "held_out_loss" in r)


@pytest.mark.parametrize("launcher", ["python", "ranks"])
def test_what_a_run_remembers_comes_back(launcher, workshop, remembering):
    """Stopped and resumed, or on two ranks, the losses by time and the averages are those of the whole run."""
    name = f"resumed_{launcher}"
    for minutes in ("0", "null"):
        finished = start([*remembering, f"run.name={name}", f"run.minutes={minutes}"], launcher=launcher)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "resumed from" in finished.stdout
    assert losses(workshop, name) == pytest.approx(losses(workshop, "remembered"), abs=1e-4)
    states = [
        json.loads((workshop / "runs" / run / "checkpoints/step_0000010/state.json").read_text())["state"]
        for run in (name, "remembered")
    ]
    assert states[0]["seen"] == states[1]["seen"] and sum(states[0]["seen"]) == 80
    assert sum(states[0]["losses"], []) == pytest.approx(sum(states[1]["losses"], []), abs=1e-4)
    for path in (workshop / "runs/remembered/ema").iterdir():
        other = load_file(workshop / "runs" / name / "ema" / path.name)
        for key, tensor in load_file(path).items():
            assert torch.allclose(tensor, other[key], atol=1e-4)


def test_an_average_that_was_never_kept_is_reconstructed(workshop, remembering):
    run, target = workshop / "runs" / "remembered", workshop / "reconstructed"
    names = {path.name for path in (run / "ema").iterdir()}
    assert names == {f"step_{s:07d}_{length}.safetensors" for s in (4, 8, 10) for length in ("0.05", "0.1")}
    finished = start(["-m", "ldm.export", str(run), str(target), "--ema", "0.1", "--step", "8"])
    assert finished.returncode == 0, finished.stderr
    assert "mixing 6 snapshots: the profile is off by 0.00%" in finished.stdout
    assert "the profile fits better" not in finished.stderr
    kept = load_file(run / "ema" / "step_0000008_0.1.safetensors")
    weights = TextToImage.load(target).denoiser.state_dict()
    assert kept.keys() == weights.keys() and all(torch.allclose(weights[key], kept[key], atol=1e-5) for key in kept)
    between = start(["-m", "ldm.export", str(run), str(target), "--ema", "0.02", "--step", "7"])
    assert between.returncode == 0
    assert "warning: the profile fits better at a step with a snapshot (as 8), or a length nearer to" in between.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("remembered --ema 0.3", "the EMA's length is 0.3, expected 0.0001 or more and less than 0.289"),
        ("remembered --ema 0.1 --step 11", "--step is 11, expected 1 to 10, the step of the last snapshot in"),
        ("nowhere --ema 0.1", "there is no run"),
        ("dit --ema 0.1", "has no snapshots (ema/*.safetensors): train with optim.ema_lengths=[0.05,0.1]"),
    ],
)
def test_what_cannot_be_reconstructed_is_told_in_one_line(words, message, workshop, remembering):
    run, *options = words.split()
    finished = start(["-m", "ldm.export", str(workshop / "runs" / run), str(workshop / "none"), *options])
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert finished.stderr.startswith("error: ") and message in finished.stderr
    assert not (workshop / "none").exists()


def test_open_clip_opens_the_clip_that_was_trained(workshop):
    import open_clip

    model = open_clip.create_model(f"local-dir:{workshop / 'runs/clip/clip'}")
    assert sum(parameter.numel() for parameter in model.parameters()) > 100_000


@pytest.fixture(scope="module")
def unet_config(workshop, few_emoji) -> str:
    """A U-Net on Stable Diffusion's path, trained to predict the noise; its run "whole" is complete."""
    path, objective = {"kind": "scaled_linear_beta"}, {"prediction": "eps"}
    config = denoiser_config(workshop, "unet", few_emoji, UNET, path=path, objective=objective)
    assert start(["ldm/train.py", "--config", config, "run.name=whole"]).returncode == 0
    return config


def test_a_u_net_trains_on_the_same_command_and_a_run_resumes_where_it_stopped(workshop, unet_config):
    config = unet_config
    begun = start(["ldm/train.py", "--config", config, "run.minutes=0"])
    assert begun.returncode == 0
    stopped = len(losses(workshop, "unet"))
    assert 0 < stopped < 10
    assert f"stopped after step {stopped} of 10, which is saved: the same command resumes from there" in begun.stdout
    finished = start(["ldm/train.py", "--config", config])
    assert f"resumed from {workshop / 'runs/unet/checkpoints'}/step_{stopped:07d}" in finished.stdout
    assert losses(workshop, "unet") == pytest.approx(losses(workshop, "whole"), abs=1e-5)


def test_a_run_cut_off_in_its_last_drawing_draws_it_again(workshop, unet_config):
    run = workshop / "runs" / "whole"
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert "held_out_loss" in lines[-1]
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    shutil.rmtree(run / "model")
    finished = start(["ldm/train.py", "--config", unet_config, "run.name=whole"])
    assert finished.returncode == 0, finished.stderr
    assert (run / "model" / "model_index.json").exists()
    assert [json.loads(line)["step"] for line in lines] == [
        json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    again = start(["ldm/train.py", "--config", unet_config, "run.name=whole"])
    assert again.returncode == 0 and "held-out" not in again.stdout


def test_a_broken_picture_is_named_and_counted(workshop, few_emoji, write_tar):
    (workshop / "broken").mkdir()
    for path in Path(few_emoji).parent.glob("*.tar.gz"):
        shard = Shard(path)
        samples = [shard[index] for index in range(len(shard))]
        members = [(f"{raw.key}.{kind}", data) for raw in samples for kind, data in raw.members.items()]
        members = [(name, b"no picture" if name == "000000000.webp" else data) for name, data in members]
        write_tar(workshop / "broken" / path.name, members)
    config = denoiser_config(workshop, "broken", str(workshop / "broken/*.tar.gz"), DIT)
    finished = start(["ldm/train.py", "--config", config])
    assert finished.returncode == 0, finished.stderr
    assert "bad sample: 000000000 in" in finished.stdout and "the image does not decode" in finished.stdout
    lines = (workshop / "runs/broken/metrics.jsonl").read_text().splitlines()
    assert [record for record in map(json.loads, lines) if "loss" in record][-1]["bad_samples"] == 1


@pytest.fixture(scope="module")
def odd_shards(workshop: Path, few_emoji: str) -> str:
    """Shards as people have them, in a folder with brackets, named from the home folder: of three one is lost and one
    is empty; captions are too long, and one json is broken."""
    folder = workshop / "my set [v2]"
    folder.mkdir()
    raw = [Shard(path)[index] for path in sorted(Path(few_emoji).parent.glob("*.tar.gz")) for index in range(8)]
    members: list[tuple[str, bytes]] = []
    for number, one in enumerate(raw):
        members += [(f"{number}.webp", one.picture), (f"{number}.txt", b"many things, " * 20 + str(number).encode())]
    (folder / "00000.tar").write_bytes(packed(*members, ("3.json", b"{broken")))
    (folder / "00001.tar").touch()
    return f"~/{os.path.relpath(folder, Path.home())}/{{00000..00002}}.tar"


def test_one_shard_trains_two_ranks_without_validation_or_preview(workshop, odd_shards):
    """From ~, with a gap that is allowed; and it is as on one rank. What is lost or cut is said and recorded."""
    runs = f"~/{os.path.relpath(workshop, Path.home())}/runs"
    sections = ["validation=null", "preview=null", f"model.vae={runs}/vae", f"model.text={runs}/clip", "data.lanes=1"]
    words = ["ldm/train.py", "--config", str(workshop / "dit.yaml"), f"run.folder={runs}", f"data.shards={odd_shards}"]
    refused = start([*words, *sections, "run.name=refused"])
    assert refused.returncode == 3 and "set data.max_missing_shards=0.34" in refused.stderr
    for name, launcher in (("shared", "ranks"), ("alone", "python")):
        done = start([*words, *sections, f"run.name={name}", "data.max_missing_shards=0.34"], launcher=launcher)
        assert done.returncode == 0, done.stdout + done.stderr
        for told in ("00002.tar: it is missing, with an unknown", "00001.tar: it holds no samples", "no section valid"):
            assert done.stdout.count(told) == 1, done.stdout
        assert done.stdout.count("16 of the first 16 captions are longer than the text encoder's 32 tokens") == 1
        assert 1 <= done.stdout.count("remark: 3 in ") <= (1 if launcher == "python" else 2)  # each rank, once
        assert "its json does not parse" in done.stdout
    assert losses(workshop, "shared") == pytest.approx(losses(workshop, "alone"), abs=1e-4)
    run = workshop / "runs" / "shared"
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {record["captions_cut"] for record in records if "loss" in record} == {1.0}
    assert {record["step"] for record in records if "loss" not in record} == {0, 5, 10}
    listed = "".join((run / "bad_samples.jsonl").read_text().splitlines())
    assert "00002.tar" in listed and "00001.tar" in listed
    assert (run / "model" / "model_index.json").exists() and not list((run / "samples").iterdir())


def test_an_autoencoder_trains_without_validation(workshop, odd_shards):
    words = ["vae/train.py", "--config", str(workshop / "vae.yaml"), "run.steps=2", "run.name=unmeasured"]
    done = start([*words, "validation=null", f"data.shards={odd_shards}", "data.max_missing_shards=0.34"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validation PSNR" not in done.stdout
    assert (workshop / "runs" / "unmeasured" / "vae" / "config.json").exists()


@pytest.mark.parametrize(("launcher", "stage"), [("ranks", 2), ("torchrun", 3)])
def test_two_ranks_train_as_one(launcher, stage, workshop, few_emoji):
    config = denoiser_config(workshop, "dit", few_emoji, DIT)
    words = ["ldm/train.py", "--config", config, f"run.name={launcher}", f"engine.zero_stage={stage}"]
    finished = start(words, launcher=launcher)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert len(losses(workshop, "dit")) == 10
    assert losses(workshop, launcher) == pytest.approx(losses(workshop, "dit"), abs=1e-4)


def test_clip_trains_on_two_ranks(workshop, few_emoji):
    config = write_config(workshop, "clip2", few_emoji, text=TEXT, image=IMAGE, engine={"precision": "fp32"})
    finished = start(["text/train.py", "--config", config, "run.steps=2"], launcher="ranks")
    assert finished.returncode == 0, finished.stdout + finished.stderr
    one = start(["text/train.py", "--config", config, "run.steps=2", "run.name=clip1"])
    assert one.returncode == 0
    assert losses(workshop, "clip2") == pytest.approx(losses(workshop, "clip1"), abs=1e-4)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["optim.lrr=1"], 2, r"unknown key optim.lrr; did you mean lr?"),
        (["data.shards=[nowhere/*.tar]"], 3, r"no shard matches 'nowhere/*.tar'"),
        (["validation.shards=[nowhere/*.tar]"], 3, r"no shard matches 'nowhere/*.tar'"),
        (["model.denoiser.sample_size=8"], 2, "sample_size is 8, but pictures of 64 pixels have latents of 16"),
        (["model.vae=nowhere"], 2, "nowhere is missing: give the file or the folder of a complete model"),
        (["model.start=runs/nowhere"], 2, "runs/nowhere/transformer/config.json is missing"),
        (["data.image_size=66"], 2, "data.image_size is 66, not a multiple of 4"),
        (["preview.scale=-1"], 2, "preview.scale is -1.0, expected 0 or more"),
        (["run.name=dit", "run.steps=7"], 2, "step_0000010 is already at step 10: set run.steps=10 or more"),
        (["optim.lr=1e30", "run.name=nan", "engine.clip=0"], 6, "at step 2, as in each of the last 10 batches"),
    ],
)
def test_a_mistake_is_one_line_and_a_code(workshop, words, code, message):
    finished = start(["ldm/train.py", "--config", str(workshop / "dit.yaml"), "run.name=mistake", *words])
    assert finished.returncode == code, finished.stderr
    error = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert "Traceback" not in finished.stderr
    if code in (2, 3):
        assert not (workshop / "runs" / "mistake").exists()


def test_batches_that_are_skipped_are_written_down_with_their_samples(workshop):
    """From a rate at which the second loss is infinite; and nothing that is not finite is saved."""
    words = ["optim.lr=1e30", "run.name=hopeless", "engine.clip=0", "run.checkpoint_every=1"]
    finished = start(["ldm/train.py", "--config", str(workshop / "dit.yaml"), *words])
    assert finished.returncode == 6
    run = workshop / "runs/hopeless"
    lines = [json.loads(line) for line in (run / "skipped/rank_00000.jsonl").read_text().splitlines()]
    assert [line["batch"] for line in lines] == list(range(1, 10))  # the tenth ends the run
    assert all(line["step"] == 2 and line["fault"] in ("the loss is inf", "the loss is nan") for line in lines)
    assert all(len(line["samples"]) == 8 and ".tar.gz:" in line["samples"][0] for line in lines)
    assert "step 2: the loss is" in finished.stdout and "on rank 0; its samples are in" in finished.stdout
    for checkpoint in (run / "checkpoints").glob("step_*"):
        for tensor in load_file(checkpoint / "rank_00000.safetensors").values():
            assert not tensor.is_floating_point() or tensor.isfinite().all()


def test_a_run_with_checkpoints_is_not_silently_started_again(workshop):
    finished = start(["ldm/train.py", "--config", str(workshop / "dit.yaml"), "run.resume=never"])
    assert finished.returncode == 2
    assert "already holds step_0000010" in finished.stderr


@pytest.mark.parametrize(("setting", "code"), [("run.steps=2", 0), ("data.image_size=66", 2)])
def test_a_launcher_that_keeps_quiet_adds_no_line_and_a_port_in_use_is_answered_by_a_free_one(setting, code, workshop):
    """docs/training.md says how it is called; deepspeed gives the same port to every training. Figures differ by
    rounding."""
    printed = []
    for launcher in ("python", "quiet"):
        words = ["ldm/train.py", "--config", str(workshop / "dit.yaml"), f"run.name={launcher}", setting]
        with socket.socket() as taken:
            taken.bind(("", 0))
            taken.listen()
            port = str(taken.getsockname()[1])
            finished = start(words, launcher=launcher, port=port, DS_ACCELERATOR="cpu", MASTER_PORT=port)
        assert finished.returncode == code, finished.stderr
        printed.append([line.split()[0] for line in finished.stdout.splitlines()])
        said = finished.stderr.splitlines()
        assert said[0].startswith(f"warning: port {port} is in use, perhaps by another training: this one uses ")
        assert [line.split()[0] for line in said[1:]] == ["error:"] * (code != 0)
    assert printed[0] == printed[1]


def test_a_second_training_in_the_same_folder_is_refused(workshop):
    lock = lock_folder(workshop / "runs" / "dit")
    try:
        finished = start(["ldm/train.py", "--config", str(workshop / "dit.yaml"), "run.steps=12"])
    finally:
        os.close(lock)
    assert finished.returncode == 2
    assert f"error: process {os.getpid()} on {socket.gethostname()} is training in" in finished.stderr
    assert len(losses(workshop, "dit")) == 10
