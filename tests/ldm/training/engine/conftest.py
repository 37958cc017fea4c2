"""Engines on real DeepSpeed: groups of runs, each group in one launch of as many processes."""

from pathlib import Path
from typing import Any

import pytest
from helpers.engines import work


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


STAGES = range(4)
MUON = {"optimizer": "muon"}
NAN = {"3": "input", "6": "gradient"}  # of what the batch at a position is spoiled


def of_all_stages(folder: Path, ranks: str) -> dict[str, dict[str, Any]]:
    """Runs that are the same training on any number of ranks."""
    runs: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        runs[f"zero{stage}"] = {"stage": stage, "batches": 10}
        runs[f"parts{stage}"] = {"stage": stage, "batches": 12, "spoiled": NAN, "engine": {"accumulation": 2}}
        runs[f"saved{stage}"] = {"stage": stage, "batches": 10, "save": str(folder / f"{ranks}_{stage}")}
        kept = str(folder / f"{ranks}_muon_{stage}")
        runs[f"muon{stage}"] = {"stage": stage, "batches": 10, "spoiled": NAN, "optim": MUON, "save": kept}
    return runs


@pytest.fixture(scope="package")
def one(folder: Path) -> dict[str, Any]:
    """Runs on one rank."""
    runs = of_all_stages(folder, "one")
    runs |= {f"spoiled{stage}": {"stage": stage, "batches": 12, "spoiled": NAN} for stage in STAGES}
    runs["bf16"] = {"stage": 0, "batches": 10, "engine": {"precision": "bf16"}}
    runs["clipped"] = {"stage": 0, "batches": 10, "engine": {"clip": 1e-12}}
    runs["start"] = {"stage": 0, "batches": 0}
    runs["hopeless"] = {"stage": 0, "batches": 20, "spoiled": {str(n): "input" for n in range(2, 20)}}
    return work(folder, runs)


@pytest.fixture(scope="package")
def two(folder: Path) -> dict[str, Any]:
    """Runs on two ranks."""
    runs = of_all_stages(folder, "two")
    for stage in STAGES:
        runs[f"ema50_{stage}"] = {"stage": stage, "batches": 52, "spoiled": NAN}
        runs[f"half{stage}"] = {"stage": stage, "batches": 5, "save": str(folder / f"half_{stage}")}
    runs |= {f"bf16_{s}": {"stage": s, "batches": 10, "engine": {"precision": "bf16"}} for s in (1, 2, 3)}
    fp16 = {"precision": "fp16"}
    overflowing = {"4": "overflow"}
    runs |= {f"fp16_{s}": {"stage": s, "batches": 10, "engine": fp16, "spoiled": overflowing} for s in STAGES}
    return work(folder, runs, ranks=2)
