"""A sample of benchmarks/reliability.py, on real processes: `make reliability` counts hundreds."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def reliability(folder: Path, *words: str) -> str:
    """What the script tells, in its last lines."""
    command = [sys.executable, "benchmarks/reliability.py", *words, "--folder", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-2000:]
    return finished.stdout


def test_two_ranks_that_are_killed_end_bit_for_bit_as_without(tmp_path: Path):
    """Under ZeRO 2, at random times: the seed's third kill takes one rank alone, and the other ends by itself."""
    told = reliability(tmp_path, "--kills", "3", "--setting", "2", "2")
    assert "1 runs, 1 ended bit for bit as without them" in told and "wrong codes 0" in told


def test_who_is_asked_to_stop_saves_and_a_rank_that_hangs_is_named(tmp_path: Path):
    told = reliability(tmp_path, "--signals", "1", "--hangs", "1")
    assert "1 left with everything saved" in told and "1 named and ended" in told


def test_a_full_disk_costs_one_checkpoint(tmp_path: Path):
    told = reliability(tmp_path, "--disks", "1")
    assert "full disks: 1 of 1 cost only that checkpoint; for good: codes [4, 4]" in told
