"""A training whose disk fills up goes on without what is for show, or ends as promised; one whose disk stalls waits."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers.disks import remount_read_only, slow_disk, small_disk, stall
from helpers.launching import DIT, VAE, denoiser_config, start, write_config

SHIPPED = {"vae": "weights/emoji64", "text": "weights/emoji64"}  # 40 MB of an export


def trained(path: str, *words: str, command: str = "ldm/train.py") -> tuple[int, list[str], list[str]]:
    done = start([command, "--config", path, *words])
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()


def free(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def test_previews_exports_and_snapshots_that_do_not_fit_are_left_out(few_emoji: str, tmp_path: Path):
    """At step 0 no export fits, and the checkpoints do: training ends well, and each loss is one line."""
    config = denoiser_config(tmp_path, "r", few_emoji, DIT, **SHIPPED)
    with small_disk("5M") as disk:
        code, out, err = trained(config, f"run.folder={disk}", "run.steps=4", "run.sample_every=2", "run.log_every=4")
        assert (code, err) == (0, []), (out, err)
        failed = [line for line in out if "cannot be written" in line]
        assert failed == [
            f"the model of step {step} could not be written ({disk}/r/model cannot be written (No space left on "
            "device): free disk space, or write elsewhere): training goes on without"
            for step in (0, 2, 4)
        ]
        records = [json.loads(line) for line in (disk / "r/metrics.jsonl").read_text().splitlines()]
        assert [(one["step"], one["written"]) for one in records if "held_out_loss" in one] == [
            (0, False),
            (2, False),
            (4, False),
        ]
        assert [path.name for path in (disk / "r").iterdir() if path.name.startswith(".model")] == []
        assert len(list((disk / "r/samples").iterdir())) == 3


def test_a_sample_that_was_not_written_is_written_when_the_run_is_resumed(few_emoji: str, tmp_path: Path):
    config = denoiser_config(tmp_path, "r", few_emoji, DIT, **SHIPPED)
    with small_disk("60M") as disk:
        filler = disk / "filler"
        filler.write_bytes(bytes(free(disk) - 5 * 2**20))
        words = (f"run.folder={disk}", "run.steps=2")
        assert trained(config, *words)[0] == 0
        assert not (disk / "r/model").exists()
        filler.unlink()  # as the message says
        assert trained(config, *words)[0] == 0
        assert (disk / "r/model/model_index.json").exists()


def test_checkpoints_that_do_not_fit_end_the_run_with_code_4(few_emoji: str, tmp_path: Path):
    config = denoiser_config(tmp_path, "r", few_emoji, {**DIT, "width": 128, "depth": 4}, **SHIPPED)
    with small_disk("2M") as disk:
        code, out, err = trained(config, f"run.folder={disk}", "run.steps=5", "run.checkpoint_every=1")
        assert (code, len(err)) == (4, 1), (out, err)
        assert err[0].startswith("error: 3 checkpoints in a row could not be written to ")
        assert sum(line.startswith("checkpoint step_000000") for line in out) == 3


@pytest.mark.parametrize("snapshot", [True, False])
def test_snapshots_that_do_not_fit_are_left_out(few_emoji: str, tmp_path: Path, snapshot: bool):
    config = denoiser_config(tmp_path, "r", few_emoji, {**DIT, "width": 64}, **SHIPPED)
    (tmp_path / "runs/r").mkdir(parents=True)
    words = ["run.steps=2", "run.checkpoint_every=2", "run.snapshot_every=1", "optim.ema_lengths=[0.05]"]
    with small_disk("100K" if snapshot else "8M") as disk:
        (tmp_path / "runs/r/ema").symlink_to(disk)
        code, out, err = trained(config, *words)
        assert (code, err) == (0, [])
        said = [line for line in out if line.startswith("the snapshot of step ") and "No space left on device" in line]
        assert len(said) == 2 * snapshot
        assert len(list(disk.iterdir())) == 2 * (not snapshot)


def test_an_autoencoder_that_does_not_fit_at_the_end_is_one_line_and_comes_when_there_is_room(
    few_emoji: str, tmp_path: Path
):
    vae = VAE | {"block_out_channels": [32, 32, 32]}
    loss = {"perceptual": None} if False else {}
    config = write_config(tmp_path, "v", few_emoji, vae=vae, loss=loss)
    (tmp_path / "runs/v").mkdir(parents=True)
    with small_disk("100K") as disk:
        (tmp_path / "runs/v/vae").symlink_to(disk / "vae")
        code, _, err = trained(config, "run.steps=2", command="vae/train.py")
        assert code == 2 and len(err) == 1 and "cannot be written (No space left on device): free disk space" in err[0]
    (tmp_path / "runs/v/vae").unlink()
    assert trained(config, "run.steps=2", command="vae/train.py")[0] == 0
    assert (tmp_path / "runs/v/vae/config.json").exists()


def test_a_run_in_a_folder_that_is_read_only_is_one_line_before_it_begins(few_emoji: str, tmp_path: Path):
    config = denoiser_config(tmp_path, "r", few_emoji, DIT, **SHIPPED)
    with small_disk("8M") as disk:
        remount_read_only(disk)
        code, _, err = trained(config, f"run.folder={disk}", "run.steps=1")
        said = f"error: {disk}/r cannot be written (Read-only file system): write elsewhere, or mount "
        assert (code, len(err)) == (2, 1) and err[0].startswith(said)
    assert trained(config, "run.steps=1")[0] == 0  # the remedy


def test_a_disk_that_stalls_costs_time_and_nothing_else(few_emoji: str, tmp_path: Path):
    """Every write waits for two seconds from the first checkpoint on; what is trained is what it would have been."""
    config = denoiser_config(tmp_path, "r", few_emoji, DIT, **SHIPPED)
    words = ("run.steps=12", "run.log_every=4", "run.checkpoint_every=2", "run.sample_every=100")
    assert trained(config, *words)[0] == 0
    with slow_disk(128) as disk, ThreadPoolExecutor() as pool:
        training = pool.submit(trained, config, *words, f"run.folder={disk}")
        while not training.done() and not (disk / "r/checkpoints/latest").exists():
            time.sleep(0.01)
        stall(disk, 2)
        code, out, err = training.result()
        assert (code, err) == (0, []), (out, err)
        manifest = "r/checkpoints/step_0000012/manifest.json"
        there, here = (json.loads((folder / manifest).read_text()) for folder in (disk, tmp_path / "runs"))
        assert there["files"]["rank_00000.safetensors"] == here["files"]["rank_00000.safetensors"]
