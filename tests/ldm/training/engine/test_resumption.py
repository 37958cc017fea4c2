"""Checkpoints of real engines: bit for bit the run that was never stopped, and any number of ranks from any other's."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.engines import work

from ldm.files.checkpoints import fault

STAGES = range(4)
MUON = {"optimizer": "muon"}
KINDS: dict[str, dict[str, Any]] = {
    "parts": {"stage": 2, "engine": {"accumulation": 2}},
    "fp16": {"stage": 2, "engine": {"precision": "fp16"}},
    "bf16": {"stage": 0, "engine": {"precision": "bf16"}},
    "muon": {"stage": 0, "optim": MUON},
    "muon_offload": {"stage": 2, "engine": {"offload": "optimizer"}, "optim": MUON},
    "muon_offload3": {"stage": 3, "engine": {"offload": "parameters"}, "optim": MUON},
    "offload": {"stage": 2, "engine": {"offload": "optimizer"}},
    "offload3": {"stage": 3, "engine": {"offload": "parameters"}},
    "recompute2": {"stage": 2, "engine": {"recompute": True}},
    "recompute3": {"stage": 3, "engine": {"recompute": True}},
    "compiled": {"stage": 2, "engine": {"compile": True}},
    "foreground": {"stage": 0, "engine": {"save_in_background": False}},
}


@pytest.fixture(scope="module")
def kinds(folder: Path) -> dict[str, Any]:
    """Each kind of training: ten batches at a stretch, five saved, and these five gone on from."""
    runs: dict[str, Any] = {}
    for name, kind in KINDS.items():
        half = folder / f"{name}_half"
        runs[name] = kind | {"batches": 10, "save": str(folder / name)}
        runs[f"{name}_half"] = kind | {"batches": 5, "save": str(half)}
        runs[f"{name}_resumed"] = kind | {"batches": 10, "load": str(half / "step_0000005"), "save": str(half)}
    return work(folder, runs)


@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_run_is_bit_for_bit_the_one_that_was_never_stopped(name, kinds):
    whole, resumed = kinds[name], kinds[f"{name}_resumed"]
    assert resumed["losses"] == whole["losses"][5:]
    assert resumed["lr"] == whole["lr"][5:]
    assert resumed["digest"] == whole["digest"] != kinds[f"{name}_half"]["digest"]


def test_how_memory_is_saved_changes_no_number_by_much(kinds, one):
    for name in ("offload", "offload3", "recompute2", "recompute3", "compiled"):
        assert kinds[name]["losses"] == pytest.approx(one["zero0"]["losses"], abs=1e-5)
    assert kinds["compiled"]["compiled"] and not kinds["offload"]["compiled"]
    for name in ("muon_offload", "muon_offload3"):
        assert kinds[name]["losses"] == pytest.approx(kinds["muon"]["losses"], abs=1e-5)


@pytest.fixture(scope="module")
def gone_on(folder: Path, two: dict[str, Any]) -> dict[str, Any]:
    """On two ranks, from what two ranks saved; and the state that two ranks saved, saved again by them."""
    runs: dict[str, Any] = {}
    for stage in STAGES:
        half = folder / f"half_{stage}" / "step_0000005"
        runs[f"resumed{stage}"] = {
            "stage": stage,
            "batches": 10,
            "load": str(half),
            "save": str(folder / f"on_{stage}"),
        }
        other = folder / f"one_{3 - stage}" / "step_0000010"  # one rank's, under another stage
        again = str(folder / f"again_{stage}")
        runs[f"from_one{stage}"] = {"stage": stage, "batches": 10, "load": str(other), "save": again}
        muon = {"stage": stage, "batches": 10, "optim": MUON, "save": str(folder / f"muon_again_{stage}")}
        runs[f"muon_from_one{stage}"] = muon | {"load": str(folder / f"one_muon_{3 - stage}" / "step_0000008")}
    return work(folder, runs, ranks=2)


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_go_on_bit_for_bit(stage, gone_on, two):
    assert gone_on[f"resumed{stage}"]["losses"] == two[f"saved{stage}"]["losses"][5:]
    assert gone_on[f"resumed{stage}"]["digest"] == two[f"saved{stage}"]["digest"]


@pytest.mark.parametrize("stage", STAGES)
def test_one_ranks_state_is_two_ranks_state(stage, one, gone_on):
    """Under another ZeRO stage, too: not a bit differs."""
    assert gone_on[f"from_one{stage}"]["digest"] == one[f"saved{3 - stage}"]["digest"]
    assert gone_on[f"muon_from_one{stage}"]["digest"] == one[f"muon{3 - stage}"]["digest"]
    assert gone_on[f"from_one{stage}"]["generators"] == [
        f"generators/{rank}/{name}" for rank in (0, 1) for name in ("cpu", "numpy", "python")
    ]


def test_two_ranks_state_is_one_ranks_state_and_back_and_trains_on_alike(one, two, folder):
    """2 -> 1 under each stage; then 50 batches more, whose losses differ by rounding alone."""
    runs: dict[str, Any] = {}
    for stage in STAGES:
        source = str(folder / f"two_{stage}" / "step_0000010")
        kept = str(folder / f"back_{stage}")
        runs[f"same{stage}"] = {"stage": 3 - stage, "batches": 10, "load": source, "save": kept}
        runs[f"on{stage}"] = {"stage": stage, "batches": 60, "load": source}
        muon = {"stage": 3 - stage, "batches": 10, "optim": MUON, "save": str(folder / f"muon_back_{stage}")}
        runs[f"muon{stage}"] = muon | {"load": str(folder / f"two_muon_{stage}" / "step_0000008")}
    runs["straight"] = {"stage": 0, "batches": 60}
    found = work(folder, runs)
    for stage in STAGES:
        assert found[f"same{stage}"]["digest"] == two[f"saved{stage}"]["digest"]
        assert found[f"muon{stage}"]["digest"] == two[f"muon{stage}"]["digest"]
        expected = found["straight"]["losses"][10:]
        assert found[f"on{stage}"]["losses"] == pytest.approx(expected, rel=1e-6)


def test_what_a_checkpoint_says_of_itself(two, folder):
    path = folder / "two_2" / "step_0000010"
    assert fault(path) is None and not list(path.parent.glob("*.partial"))
    record = json.loads((path / "state.json").read_text())
    assert record["step"] == record["position"] == 10 and record["samples_seen"] == 80
    assert (record["ranks"], record["zero_stage"]) == (2, 2)
    assert record["versions"].keys() == {"latent-foundry", "torch", "deepspeed"}
    names = {file.name for file in path.iterdir()}
    assert names == {"manifest.json", "state.json", "rank_00000.safetensors", "rank_00001.safetensors"}


def test_another_networks_checkpoint_is_refused(one, folder):
    runs = {"wider": {"stage": 0, "batches": 10, "hidden": 40, "load": str(folder / "one_0" / "step_0000010")}}
    error = work(folder, runs)["wider"]["error"]
    assert "CheckpointError" in error and "holds 33 elements of blocks.0.0.bias, but this network has 40" in error
