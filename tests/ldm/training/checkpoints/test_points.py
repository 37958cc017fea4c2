"""A save that goes wrong at any call of the file system costs nothing but itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.points import (
    RANK_1_FAILS,
    Calls,
    broken_promise,
    in_haste,
    make_savers,
    points_of_a_save,
    points_of_giving_up,
    prepare_folder,
    save,
    ways,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    prepare_folder(folder)
    return folder


def test_all_parts_of_a_save_are_among_the_points(folder: Path):
    """A list from which a call is missing would let its failure pass."""
    told = {str(point) for point in points_of_a_save(folder)}
    written = ["rank_00000.safetensors", "rank_00001.safetensors", "rank_00001.json.partial", "state.json"]
    written += ["manifest.json", "latest.partial"]
    assert {f"fsync {name}" for name in [*written, "step_0000003.partial", "checkpoints", "checkpoints (2)"]} <= told
    assert {f"save_file rank_0000{rank}.safetensors" for rank in (0, 1)} <= told
    assert {"mkdir step_0000003.partial", "rename step_0000003.partial", "replace latest.partial"} <= told
    assert {"rename step_0000001", "rmtree step_0000001.partial (2)"} <= told


def test_content_is_on_the_disk_before_it_is_promised(folder: Path, tmp_path: Path):
    """Files before the manifest that lists them, the folder before its name, its name before the next is removed."""
    with in_haste(), Calls(tmp_path / "checkpoints") as calls:
        savers = make_savers(tmp_path / "checkpoints", keep=1)
        assert save(savers, 1) and save(savers, 2)
    order = [str(point) for point in calls.points]
    steps = [
        ["fsync rank_00001.safetensors", "replace rank_00001.json.partial", "read_text rank_00001.json"],
        ["fsync rank_00000.safetensors", "write_text manifest.json"],
        ["fsync state.json", "write_text manifest.json"],
        ["read_text rank_00001.json", "write_text manifest.json", "fsync manifest.json", "fsync step_0000001.partial"],
        ["fsync step_0000001.partial", "rename step_0000001.partial", "fsync checkpoints", "write_text latest.partial"],
        ["write_text latest.partial", "fsync latest.partial", "replace latest.partial", "fsync checkpoints (2)"],
        ["rename step_0000002.partial", "fsync checkpoints (3)", "rename step_0000001"],
    ]
    for expected in steps:
        assert [order.index(name) for name in expected] == sorted(order.index(name) for name in expected), expected


def test_a_save_that_goes_wrong_anywhere_costs_nothing_but_itself(folder: Path):
    broken = {
        f"{point}: {how}": wrong
        for point in points_of_a_save(folder)
        for how in ways(point)
        if (wrong := broken_promise(folder, {point: how})) is not None
    }
    assert not broken


def test_giving_a_save_up_may_go_wrong_too(folder: Path):
    points = points_of_giving_up(folder)
    assert [str(point) for point in points] == ["rmtree step_0000003.partial"]
    for how in ways(points[0]):
        assert broken_promise(folder, {RANK_1_FAILS: "half", points[0]: how}) is None, how


def test_what_would_be_lost_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A save that gave a checkpoint its name before its manifest would break the promise above."""
    monkeypatch.setattr("ldm.files.checkpoints.seal", lambda partial, digests, name: None)
    assert broken_promise(folder, {RANK_1_FAILS: "full"}) is not None
