"""Several ranks' savers, played in one process over one folder: a checkpoint is named when all have written."""

from __future__ import annotations

import errno
import json
import math
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.points import RANKS, holds, in_haste, make_savers, save, state, wait
from safetensors import safe_open
from torch import Tensor

from ldm.files.checkpoints import Checkpoints, fault
from ldm.interop.fragments import Fragments, Span
from ldm.training.checkpoints.saver import Abandoned, NonFiniteStateError, Saver, Status


@pytest.fixture(autouse=True)
def haste() -> Iterator[None]:
    with in_haste():
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def begin(saver: Saver, step: int, extra: Mapping[str, Tensor] | None = None, **record: Any) -> None:
    tensors, spans = state(step, saver.rank)
    saver.begin(step, tensors | dict(extra or {}), spans, {"step": step} | record)


def end(savers: list[Saver], *, abandon: bool) -> None:
    for saver in savers:
        saver.end(abandon=abandon)


class Gate:
    """Holds back the writing of one rank's file until it is opened, or lets it fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int, error: Exception | None = None) -> None:
        self.open = threading.Event()
        from ldm.training.checkpoints import saver

        real = saver.write_fragments

        def write(path: Path, tensors: Mapping[str, Tensor], spans: Mapping[str, Span]) -> None:
            if path.name == f"rank_{rank:05d}.safetensors":
                assert self.open.wait(60)
                if error is not None:
                    raise error
            real(path, tensors, spans)

        monkeypatch.setattr(saver, "write_fragments", write)


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def test_what_all_ranks_wrote_is_one_checkpoint(folder: Path):
    savers = make_savers(folder)
    assert save(savers, 1)
    assert names(folder) == {"step_0000001", "latest"}
    path = folder / "step_0000001"
    assert names(path) == {"rank_00000.safetensors", "rank_00001.safetensors", "state.json", "manifest.json"}
    assert fault(path) is None and holds(path)
    assert json.loads((path / "state.json").read_text()) == {"step": 1}
    with Fragments(path) as fragments:
        assert {key for key in fragments.keys() if key.startswith("generators")} == {  # noqa: SIM118
            "generators/0/cpu",
            "generators/1/cpu",
        }
    assert [saver.status for saver in savers] == [Status.IDLE] * RANKS
    assert [saver.error for saver in savers] == [None] * RANKS


@pytest.mark.parametrize("late", range(RANKS))
def test_a_checkpoint_has_no_name_before_the_last_rank_has_written(
    folder: Path, late: int, monkeypatch: pytest.MonkeyPatch
):
    gate = Gate(monkeypatch, late)
    savers = make_savers(folder)
    savers[0].prepare(1, 0)
    for saver in savers:
        begin(saver, 1)
    early = savers[1 - late]
    if early.rank != 0:  # the main rank's status tells of all, the others' of their own part
        assert early._thread is not None
        early._thread.join()
        assert early.status is Status.WRITTEN
    assert names(folder) == {"step_0000001.partial"} and savers[0].status is Status.WRITING
    gate.open.set()
    assert not wait(savers)
    end(savers, abandon=False)
    assert fault(folder / "step_0000001") is None


@pytest.mark.parametrize("failing", range(RANKS))
def test_a_rank_that_cannot_write_costs_only_this_checkpoint(
    folder: Path, failing: int, monkeypatch: pytest.MonkeyPatch
):
    savers = make_savers(folder)
    assert save(savers, 1)
    with monkeypatch.context() as patched:
        gate = Gate(patched, failing, full_disk())
        savers[0].prepare(2, 0)
        for saver in savers:
            begin(saver, 2)
        gate.open.set()
        assert wait(savers)
        assert savers[failing].status is Status.FAILED and savers[failing].error.__class__ is OSError
        assert savers[1 - failing].status is not Status.FAILED
        end(savers[::-1], abandon=True)  # rank 0 last, or the other might be writing into what it has removed
    assert names(folder) == {"step_0000001", "latest"} and fault(folder / "step_0000001") is None
    assert (folder / "latest").read_text() == "step_0000001\n"
    if failing != 0:
        assert isinstance(savers[0].error, Abandoned)
    assert save(savers, 3) and holds(folder / "step_0000003")


def test_what_a_late_rank_leaves_of_an_abandoned_save_is_cleared_by_the_next(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """The main rank may have removed the folder before a slow one has ended: the disk may be full of just that."""
    monkeypatch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None)
    savers = make_savers(folder)
    savers[0].prepare(1, 0)
    for saver in savers:
        begin(saver, 1, {"bad": torch.tensor(math.nan)} if saver.rank else None)
    assert wait(savers)
    end(savers, abandon=True)
    monkeypatch.undo()
    assert names(folder) == {"step_0000001.partial"}
    assert save(savers, 2)
    assert names(folder) == {"step_0000002", "latest"}


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rank", range(RANKS))
def test_a_number_that_is_not_finite_is_never_saved(folder: Path, rank: int, number: float):
    savers = make_savers(folder)
    savers[0].prepare(1, 0)
    bad = torch.zeros(1000, dtype=torch.bfloat16 if rank else torch.float32)
    bad[777] = number
    for saver in savers:
        begin(saver, 1, {"exp_avg/blocks.0.bias": bad} if saver.rank == rank else None)
    assert wait(savers)
    assert isinstance(savers[rank].error, NonFiniteStateError)
    assert str(savers[rank].error) == "exp_avg/blocks.0.bias is not finite, so nothing was saved"
    end(savers[::-1], abandon=True)  # rank 0 last, or the other might be writing into what it has removed
    assert names(folder) == set()


def test_training_may_go_on_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """What is saved is what was there when the save began."""
    gate = Gate(monkeypatch, 0)
    savers = make_savers(folder)
    savers[0].prepare(1, 0)
    record: dict[str, Any] = {"list": [1]}
    for saver in savers:
        tensors, spans = state(1, saver.rank)
        saver.begin(1, tensors, spans, record)
        for tensor in tensors.values():
            tensor.fill_(7)
        tensors.clear()
        spans.clear()
    record["list"].append(2)
    gate.open.set()
    assert not wait(savers)
    end(savers, abandon=False)
    assert holds(folder / "step_0000001")
    assert json.loads((folder / "step_0000001" / "state.json").read_text()) == {"list": [1]}


def test_tensors_of_any_layout_are_saved(folder: Path):
    saver = Saver(Checkpoints(folder, keep=1), rank=0, ranks=1)
    image = torch.randn(2, 3, 4, 5)
    odd = {
        "transposed": torch.arange(12.0).view(3, 4).T,
        "channels_last": image.to(memory_format=torch.channels_last),
        "strided": torch.arange(10.0)[::3],
        "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
        "number": torch.tensor(5),
        "empty": torch.empty(0),
        "learned": torch.ones(3, requires_grad=True),
    }
    odd |= {"shared": odd["transposed"]}
    saver.prepare(1, 0)
    saver.begin(1, odd, {}, {})
    assert not wait([saver]), saver.error
    saver.end(abandon=False)
    with Fragments(folder / "step_0000001") as fragments:
        assert all(torch.equal(fragments.whole(key), tensor) for key, tensor in odd.items())


def test_a_disk_that_is_too_small_is_found_out_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    savers = make_savers(folder)
    assert save(savers, 1)
    usage = shutil.disk_usage(folder)._replace(free=5 * 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    savers[0].prepare(2, 5 * 2**20)
    (folder / "step_0000002.partial").rmdir()
    with pytest.raises(OSError, match=r"step_0000002.partial needs 6 MiB, but only 5 MiB are free"):
        savers[0].prepare(2, 6 * 2**20)
    assert names(folder) == {"step_0000001", "latest"} and savers[0].status is Status.IDLE
    monkeypatch.undo()
    assert save(savers, 2)


def test_what_an_earlier_attempt_at_the_same_step_left_is_not_taken_for_this_one(folder: Path):
    """A digest that rank 1 left before it was killed says nothing of what it writes now."""
    partial = folder / "step_0000001.partial"
    partial.mkdir(parents=True)
    (partial / "rank_00001.json").write_text(json.dumps({"size": 1, "sha256": "0"}))
    (partial / "stray").touch()
    assert save(make_savers(folder), 1)
    assert fault(folder / "step_0000001") is None


def test_memory_is_taken_once(folder: Path):
    """The copies of one save are written over by the next, as long as the tensors are the same."""
    saver = make_savers(folder)[1]
    saver.checkpoints.folder.mkdir()
    tensors, spans = state(1, 1)
    places = []
    for step in (1, 2, 3):
        (folder / f"step_{step:07d}.partial").mkdir()
        if step == 3:
            tensors["weights/matrix"] = torch.ones(300, dtype=torch.float64)
        tensors["weights/matrix"].fill_(step)
        saver.begin(step, tensors, spans, {})
        saver.end(abandon=False)
        assert saver.error is None
        places.append(saver._staging.tensors["weights/matrix"].data_ptr())
        with safe_open(folder / f"step_{step:07d}.partial" / "rank_00001.safetensors", "pt") as file:
            assert torch.equal(file.get_tensor("weights/matrix"), tensors["weights/matrix"])
    assert places[0] == places[1]


def test_no_save_begins_before_the_last_has_ended(folder: Path, monkeypatch: pytest.MonkeyPatch):
    gate = Gate(monkeypatch, 0)
    savers = make_savers(folder)
    savers[0].prepare(1, 0)
    for saver in savers:
        begin(saver, 1)
    with pytest.raises(AssertionError, match="still being written"):
        begin(savers[0], 2)
    gate.open.set()
    assert not wait(savers)
    end(savers, abandon=False)
    assert holds(folder / "step_0000001")


def test_the_newest_are_kept(folder: Path):
    savers = make_savers(folder, keep=2)
    for step in range(1, 6):
        assert save(savers, step)
        assert names(folder) == {"latest", *(f"step_{n:07d}" for n in (step - 1, step) if n)}
