"""What a run's folder is read as: from its newest valid checkpoint, with or without an export beside it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from ldm import DrawRequest, TextToImage
from ldm.files.checkpoints import Checkpoints, Digest
from ldm.interop import trained_run
from ldm.interop.fragments import Span, write_fragments
from ldm.interop.read_model import read_model
from ldm.interop.trained_run import run_folder, trained_weights

REQUEST = DrawRequest(prompt="x", steps=2, scale=3.0, sampler="euler", seed=1)


def add_checkpoint(run: Path, step: int, averages: Mapping[str, Tensor], **state: Any) -> Path:
    checkpoints = Checkpoints(run / "checkpoints", keep=1)
    partial = checkpoints.path(step).with_suffix(".partial")
    partial.mkdir(parents=True)
    flat = {f"ema/{name}": tensor.flatten().clone() for name, tensor in averages.items()}
    spans = {name: Span(name, 0, tensor.numel()) for name, tensor in flat.items()}
    write_fragments(partial / "rank_00000.safetensors", flat, spans)
    (partial / "state.json").write_text(json.dumps(state))
    return checkpoints.commit(partial, {path.name: Digest.of(path) for path in partial.iterdir()})


def config_of(folder: Path, steps: int = 30) -> str:
    """The part of a run's configuration that a reader needs, for the tiny DiT."""
    tree = {
        "run": {"steps": steps},
        "data": {"image_size": 16},
        "model": {
            "vae": str(folder),
            "text": str(folder),
            "denoiser": {"kind": "dit", "depth": 2, "width": 32, "heads": 2, "sample_size": 8},
            "path": {"kind": "rectified_flow"},
            "objective": {"prediction": "velocity"},
        },
    }
    return yaml.safe_dump(tree)


@pytest.fixture
def weights(dit_folder: Path) -> dict[str, Tensor]:
    return dict(read_model(dit_folder, dtype=torch.float32).denoiser.state_dict())


@pytest.fixture
def run(tmp_path: Path, dit_folder: Path, weights: dict[str, Tensor]) -> Path:
    """A run with an export, of step 10 by its metrics, and other weights in its checkpoints of steps 10 and 20."""
    run = tmp_path / "trial"
    shutil.copytree(dit_folder, run / "model")
    records = [{"step": 0, "held_out_loss": 1.0}, {"step": 10, "held_out_loss": 0.5}, {"step": 20, "loss": 0.4}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for step in (10, 20):
        more = {name: tensor + step / 1000 for name, tensor in weights.items()}
        add_checkpoint(run, step, more, config=config_of(dit_folder), samples_seen=8 * step, kind="denoiser")
    return run


def damage(checkpoint: Path) -> None:
    path = checkpoint / "rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def first_weight(pipe: TextToImage, weights: Mapping[str, Tensor]) -> float:
    """By how much the first weight differs."""
    name = next(iter(weights))
    return (pipe.denoiser.state_dict()[name] - weights[name]).flatten()[0].item()


def load(path: Path) -> TextToImage:
    return TextToImage.load(path, device="cpu", dtype="fp32")


@pytest.mark.parametrize("inside", ["", "model"])
def test_the_newest_checkpoint_counts_and_not_the_export(run: Path, weights: dict[str, Tensor], inside: str):
    pipe = load(run / inside)
    assert first_weight(pipe, weights) == pytest.approx(0.02, abs=1e-5)
    assert "averaged weights of step 20 of 30" in pipe.description and pipe.name == "trial"


def test_a_damaged_one_is_passed_over_with_a_warning(run: Path, weights: dict[str, Tensor]):
    damage(run / "checkpoints/step_0000020")
    with pytest.warns(UserWarning, match=r"step_0000020 is damaged \(rank_00000.* sha256.*\): step_0000010 is"):
        pipe = load(run)
    assert first_weight(pipe, weights) == pytest.approx(0.01, abs=1e-5)
    assert "averaged weights of step 10 of 30" in pipe.description
    assert (run / "checkpoints/step_0000020").is_dir()  # a reader moves nothing


def test_where_none_is_valid_the_last_export_is_read_and_its_step_said(run: Path, weights: dict[str, Tensor]):
    for path in (run / "checkpoints").glob("step_*"):
        damage(path)
    with pytest.warns(UserWarning, match="the last export in .*trial is read instead, if there is one"):
        pipe = load(run)
    assert first_weight(pipe, weights) == 0.0 and "averaged weights of step 10" in pipe.description


def test_checkpoints_that_were_removed_leave_an_export_with_its_step(run: Path, weights: dict[str, Tensor]):
    shutil.rmtree(run / "checkpoints")
    pipe = load(run)
    assert first_weight(pipe, weights) == 0.0 and "averaged weights of step 10" in pipe.description


def test_a_run_without_an_export_is_built_from_its_configuration(run: Path):
    with_export = load(run).pixels(REQUEST)
    shutil.rmtree(run / "model")
    pipe = load(run)
    assert "averaged weights of step 20 of 30" in pipe.description and pipe.native_size == 16
    torch.testing.assert_close(pipe.pixels(REQUEST), with_export)


def test_a_checkpoint_that_training_removes_meanwhile_is_not_missed(
    run: Path, weights: dict[str, Tensor], dit_folder: Path, monkeypatch: pytest.MonkeyPatch, recwarn: Any
):
    """The newest one, because two newer ones were written while it was being verified."""
    fault, calls = trained_run.fault, list[Path]()

    def removing(folder: Path) -> str | None:
        calls.append(folder)
        if len(calls) == 1:
            shutil.rmtree(folder)
            add_checkpoint(run, 30, weights, config=config_of(dit_folder))
        return fault(folder)

    monkeypatch.setattr(trained_run, "fault", removing)
    found = trained_weights(run)
    assert found is not None and found.step == 30 and [path.name[-2:] for path in calls] == ["20", "30"]
    assert not recwarn.list


def test_the_hash_is_the_exports_where_it_is_the_same_model(run: Path, weights: dict[str, Tensor], dit_folder: Path):
    other = load(run)
    add_checkpoint(run, 30, weights, config=config_of(dit_folder))
    same = load(run)
    assert same.weights_hash == load(dit_folder).weights_hash
    shutil.rmtree(run / "checkpoints")  # as training removes old ones before the first picture is drawn
    assert other.weights_hash != same.weights_hash and len(other.weights_hash) == 10


def test_a_network_of_other_sizes_is_named(run: Path, weights: dict[str, Tensor], dit_folder: Path):
    first = next(iter(weights))
    add_checkpoint(run, 30, weights | {first: torch.zeros(3)}, config=config_of(dit_folder))
    with pytest.raises(ValueError, match=rf"step_0000030 holds 3 elements of {first}, expected \d+: its configuration"):
        load(run)


@pytest.mark.parametrize(
    ("sections", "kind"), [({"model": {}}, "denoiser"), ({"vae": {}}, "vae"), ({"text": {}, "image": {}}, "clip")]
)
def test_the_kind_of_a_run_of_version_0_1_is_found_by_its_sections(tmp_path: Path, sections: Any, kind: str):
    add_checkpoint(tmp_path, 1, {"a": torch.zeros(1)}, config=yaml.safe_dump({"run": {"steps": 2}} | sections))
    found = trained_weights(tmp_path)
    assert found is not None and found.kind == kind and found.describe() == "averaged weights of step 1 of 2"


def test_what_is_no_run(tmp_path: Path, dit_folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert run_folder(dit_folder) is None and run_folder(tmp_path / "nowhere") is None
    add_checkpoint(tmp_path / "trial", 1, {"a": torch.zeros(1)}, config="run: {steps: 1}")
    assert run_folder(tmp_path / "trial/vae") == tmp_path / "trial"
    assert run_folder(tmp_path / "trial/samples") is None
    monkeypatch.chdir(tmp_path / "trial")
    assert run_folder(Path()) == Path()
