"""The engine on real DeepSpeed, each run in processes of its own."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ldm.engine import EngineConfig, deepspeed_config, use_bf16

# So wide that one matrix has more than 100,000 elements: ZeRO 3 keeps smaller parameters on every rank.
WIDE = 16_000

WORKER = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from ldm.engine import Engine, EngineConfig, NonFiniteError, OptimConfig, start_process


def run(world, *, stage, steps, hidden=33, precision="fp32", clip=1.0, resume=None, save=None, nan_at=None,
        nan_gradient_at=None):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, hidden), nn.GELU(), nn.Linear(hidden, 5))
    config = EngineConfig(zero_stage=stage, precision=precision, clip=clip)
    optim = OptimConfig(lr=0.33 / hidden, ema_decay=0.9, weight_decay=0.01, ema_lengths=(0.1,))
    engine = Engine(network, world, config=config, optim=optim, batch_size=8, total_steps=100)
    if resume:
        engine.load(Path(resume))
    data = torch.Generator().manual_seed(1)
    losses, output = [], torch.zeros(1)
    for step in range(steps):
        x = torch.randn(8, 7, generator=data)
        y = x[:, :5].clone()
        if step < engine.step:
            continue
        if step == nan_at:
            x[0, 0] = float("nan")
        mine = slice(world.rank * 8 // world.ranks, (world.rank + 1) * 8 // world.ranks)
        output = engine(x[mine])
        loss = (output.float() - y[mine]).square().mean()
        if step == nan_gradient_at:  # sqrt has no derivative at 0, and 0 times infinity is no number
            loss = loss + (0 * loss).sqrt()
        try:
            losses.append(engine.update(loss))
        except NonFiniteError as error:
            losses.append(str(error))
            break
    if save:
        engine.save(Path(save), {"samples_seen": 8 * engine.step})
    ema = engine.averaged_weights()
    sums = {name: tensor.double().sum().item() for name, tensor in ema.items()}
    power = {name: tensor.double().sum().item() for name, tensor in engine.averaged_weights(0.1).items()}
    uneven = torch.arange(3.0)[: 1 + 2 * world.rank]  # [0] on rank 0, [0, 1, 2] on rank 1
    means = engine.means({"rank": torch.tensor(float(world.rank)), "uneven": uneven, "none": torch.empty(0)})
    gathered = engine.gather(torch.tensor([[world.rank, 1.0]], dtype=torch.float64)).tolist()
    agreed = [engine.agree(world.rank == wishing) for wishing in range(2)]
    shapes = {name: list(tensor.shape) for name, tensor in ema.items()}
    dtypes = [str(output.dtype), str(next(network.parameters()).dtype), str(next(iter(ema.values()), output).dtype)]
    found = {"means": means, "gathered": gathered, "power": power, "agreed": agreed, "dtypes": dtypes}
    found["total"] = engine.total(world.rank + 2)
    return found | {"losses": losses, "ema": sums, "shapes": shapes}


order = json.loads(sys.argv[-1])  # the launcher puts --local_rank before it
world = start_process()
found = {name: run(world, **arguments) for name, arguments in order["runs"].items()}
if world.is_main:
    Path(order["out"]).write_text(json.dumps(found))
"""


def work(folder: Path, runs: dict[str, dict], *, ranks: int = 1) -> dict[str, dict]:
    """Run the worker above in `ranks` processes, which do the named runs one after the other."""
    worker, out = folder / "worker.py", folder / f"out_{ranks}.json"
    worker.write_text(WORKER)
    out.unlink(missing_ok=True)
    words = json.dumps({"out": str(out), "runs": runs})
    launcher = [sys.executable]
    if ranks > 1:
        with socket.socket() as probe:  # deepspeed's own port may be taken by somebody's training
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        deepspeed = Path(sys.executable).parent / "deepspeed"
        launcher = [str(deepspeed), "--num_gpus", str(ranks), "--master_port", port]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launcher, str(worker), words]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert out.exists(), finished.stdout[-2000:] + finished.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def one(folder):
    """Runs on one rank: ten steps under every ZeRO stage, three steps, a NaN in the fourth, and four steps saved."""
    runs: dict[str, dict] = {f"zero{stage}": {"stage": stage, "steps": 10} for stage in range(4)}
    runs["wide0"] = {"stage": 0, "steps": 10, "hidden": WIDE}
    runs["bf16"] = {"stage": 0, "steps": 10, "precision": "bf16"}
    runs["clipped"] = {"stage": 0, "steps": 10, "clip": 1e-12}
    runs["start"] = {"stage": 0, "steps": 0}
    runs["three"] = {"stage": 0, "steps": 3}
    runs["nan"] = {"stage": 0, "steps": 10, "nan_at": 3}
    for stage in (0, 2):
        runs[f"nan_gradient{stage}"] = {"stage": stage, "steps": 10, "nan_gradient_at": 3}
    for stage in (0, 2):
        runs[f"saved{stage}"] = {"stage": stage, "steps": 4, "save": str(folder / f"one_{stage}" / "step_0000004")}
    return work(folder, runs)


@pytest.fixture(scope="module")
def two(folder):
    """Runs on two ranks."""
    runs: dict[str, dict] = {f"zero{stage}": {"stage": stage, "steps": 10} for stage in (0, 2, 3)}
    runs["wide3"] = {"stage": 3, "steps": 10, "hidden": WIDE}
    runs |= {f"bf16_{stage}": {"stage": stage, "steps": 10, "precision": "bf16"} for stage in (1, 2, 3)}
    runs["saved3"] = {"stage": 3, "steps": 4, "save": str(folder / "two_3" / "step_0000004")}
    return work(folder, runs, ranks=2)


def test_the_loss_falls(one):
    losses = one["zero0"]["losses"]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_is_the_same_training(stage, one):
    found, expected = one[f"zero{stage}"], one["zero0"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-6)
    assert found["ema"] == pytest.approx(expected["ema"], abs=1e-5)
    assert found["power"] == pytest.approx(expected["power"], abs=1e-5)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_processes_are_the_same_training_as_one(stage, one, two):
    found, expected = two[f"zero{stage}"], one["zero0"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["ema"] == pytest.approx(expected["ema"], abs=1e-5)
    assert found["power"] == pytest.approx(expected["power"], abs=1e-5)
    assert found["shapes"] == expected["shapes"]


def test_a_matrix_that_no_rank_holds_whole_is_the_same_training(one, two):
    found, expected = two["wide3"], one["wide0"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)
    assert found["ema"] == pytest.approx(expected["ema"], abs=1e-3)  # sums of up to 112,000 elements
    assert found["shapes"] == expected["shapes"]


def test_ranks_share_their_numbers(one, two):
    assert one["zero0"]["means"] == {"rank": 0, "uneven": 0}
    assert two["zero0"]["means"] == {"rank": 0.5, "uneven": 0.75}
    assert one["zero0"]["gathered"] == [[0, 1]] and two["zero0"]["gathered"] == [[0, 1], [1, 1]]
    assert one["zero0"]["agreed"] == [True, False]
    assert two["zero0"]["agreed"] == [True, True]
    assert one["zero0"]["total"] == 2 and two["zero0"]["total"] == 5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_processes_in_bfloat16_are_the_same_training_as_one(stage, one, two):
    found, expected = two[f"bf16_{stage}"], one["bf16"]
    assert found["dtypes"] == expected["dtypes"] == ["torch.bfloat16", "torch.float32", "torch.float32"]
    assert found["losses"] == pytest.approx(expected["losses"], abs=3e-3)
    assert expected["losses"] != pytest.approx(one["zero0"]["losses"], abs=1e-6)
    assert expected["losses"] == pytest.approx(one["zero0"]["losses"], abs=2e-2)


def test_a_clipped_gradient_moves_less(one):
    """So far that it is small against AdamW's epsilon, which otherwise would make up for its length."""
    moved = {name: abs(one[name]["ema"]["0.weight"] - one["start"]["ema"]["0.weight"]) for name in ("zero0", "clipped")}
    assert moved["clipped"] < 0.1 * moved["zero0"]


@pytest.mark.parametrize(("stage", "ranks"), [(0, "one"), (2, "one"), (3, "two")])
def test_a_resumed_run_continues_as_if_never_stopped(stage, ranks, one, two, folder):
    checkpoint = folder / f"{ranks}_{stage}" / "step_0000004"
    assert not list(checkpoint.parent.glob("*.partial"))
    assert json.loads((checkpoint / "state.json").read_text())["samples_seen"] == 32
    runs = {"resumed": {"stage": stage, "steps": 10, "resume": str(checkpoint)}}
    found = work(folder, runs, ranks=2 if ranks == "two" else 1)["resumed"]
    assert found["losses"] == pytest.approx(one["zero0"]["losses"][4:], abs=1e-5)
    assert found["ema"] == pytest.approx(one["zero0"]["ema"], abs=1e-5)


def test_a_checkpoint_of_another_number_of_ranks_is_refused(two, folder):
    runs = {"resumed": {"stage": 3, "steps": 10, "resume": str(folder / "two_3" / "step_0000004")}}
    with pytest.raises(AssertionError, match="written by 2 ranks under ZeRO 3, this run has 1 under ZeRO 3"):
        work(folder, runs)


@pytest.mark.parametrize("damage", ["cut", "gone", "no record", "no average"])
def test_a_damaged_checkpoint_is_named(damage, one, folder):
    checkpoint = shutil.copytree(folder / "one_0" / "step_0000004", folder / damage / "step_0000004")
    state = next(checkpoint.rglob("*model_states.pt"))
    match damage:
        case "cut":
            state.write_bytes(state.read_bytes()[:1000])
        case "gone":
            state.unlink()
        case "no record":
            (checkpoint / "state.json").write_text("{")
        case "no average":
            (checkpoint / "ema_00000.pt").unlink()
    with pytest.raises(AssertionError, match=r"CheckpointError: .*step_0000004 cannot be read \(.+\): remove it"):
        work(folder, {"resumed": {"stage": 0, "steps": 10, "resume": str(checkpoint)}})


def test_a_nan_stops_the_run_names_the_step_and_moves_nothing(one):
    losses = one["nan"]["losses"]
    assert losses[:3] == one["zero0"]["losses"][:3]
    assert "step 4 is nan" in losses[3]
    assert one["nan"]["ema"] == one["three"]["ema"]


@pytest.mark.parametrize("stage", [0, 2])
def test_a_gradient_that_is_no_number_stops_the_run_too(stage, one):
    found = one[f"nan_gradient{stage}"]
    assert re.search(r"gradient of step 4 is (nan|inf)", found["losses"][3])
    assert found["ema"] == pytest.approx(one["three"]["ema"], abs=1e-5)


def test_deepspeeds_settings_are_derived():
    config = EngineConfig(zero_stage=3, clip=0.5)
    settings = deepspeed_config(config, batch_size=64, ranks=4, bf16=True)
    assert settings["train_batch_size"] == 64
    assert settings["train_micro_batch_size_per_gpu"] == 16
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["gradient_clipping"] == 0.5
    assert settings["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    with pytest.raises(ValueError, match=r"batch_size \(64\) is not a multiple of the 3 ranks"):
        deepspeed_config(config, batch_size=64, ranks=3, bf16=False)


def test_precision_follows_the_hardware_unless_told():
    cpu = torch.device("cpu")
    assert use_bf16("bf16", cpu)
    assert not use_bf16("fp32", cpu)
    able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert use_bf16("auto", cpu) == able
