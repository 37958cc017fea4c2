"""A sample of benchmarks/reliability.py, on real processes: `make reliability` counts hundreds."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

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


@pytest.mark.slow
def test_two_ranks_that_are_killed_end_bit_for_bit_as_without(tmp_path: Path):
    """Under ZeRO 2, at random times, one of them or both."""
    told = reliability(tmp_path, "--kills", "2", "--setting", "2", "2")
    assert re.search(r"kills: \d+ in (\d+) runs, \1 ended bit for bit as without them", told), told
    assert "wrong codes 0" in told


@pytest.mark.slow
def test_who_is_asked_to_stop_saves_and_a_rank_that_hangs_is_named(tmp_path: Path):
    told = reliability(tmp_path, "--signals", "1", "--hangs", "1")
    assert "1 left with everything saved" in told and "1 named and ended" in told


@pytest.mark.slow
def test_a_full_disk_costs_one_checkpoint(tmp_path: Path):
    told = reliability(tmp_path, "--disks", "1")
    assert "full disks: 1 of 1 cost only that checkpoint; for good: codes [4, 4]" in told


def rank_of(process: Path) -> str | None:
    """The rank of one of this test's processes, by /proc/PID; None for others."""
    try:
        variables = (process / "environ").read_text().split("\0")
    except OSError:
        return None
    found: dict[str, str] = {}
    for variable in variables:
        name, _, value = variable.partition("=")
        found[name] = value
    return found.get("RANK") if found.get("OF_THE_TEST") == str(os.getpid()) and "RANK" in found else None


@contextmanager
def two_ranks(folder: Path, *words: str, restarts: int = 0) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A tiny training by torchrun, and its log."""
    tiny = (ROOT / "benchmarks/faults.py").read_text().partition('TINY = """')[2].partition('"""')[0].split()
    tiny += [f"run.folder={folder}", "run.name=tiny", "engine.zero_stage=2", "run.steps=60"]
    tiny += ["validation.shards=data/emoji64/val/00000.tar.gz", *words]
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "--max-restarts", str(restarts), "ldm/train.py", "--config", "configs/demo.yaml", *tiny]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OF_THE_TEST": str(os.getpid())}
    log = folder / "log"
    with log.open("w") as output:
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output) as process:
            try:
                yield process, log
            finally:
                process.terminate()


def send_to_rank_1(number: signal.Signals, *, when: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """As soon as the log says so."""
    while when not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    rank_1 = next(path for path in Path("/proc").iterdir() if path.name.isdigit() and rank_of(path) == "1")
    os.kill(int(rank_1.name), number)


@pytest.mark.slow
def test_torchrun_starts_ranks_again_and_the_run_goes_on(tmp_path: Path):
    with two_ranks(tmp_path, restarts=1) as (process, log):
        send_to_rank_1(signal.SIGKILL, when="step 10/", process=process, log=log)
        assert process.wait(200) == 0, log.read_text()[-4000:]
    told = log.read_text()
    assert "error: rank 1 died" in told and told.count("resumed from") == 1 and "step 60/60" in told


def test_one_rank_that_is_asked_to_stop_ends_what_rank_0_draws_for_hours(tmp_path: Path):
    """Rank 1 waits for rank 0 meanwhile, deaf to signals as far as Python goes."""
    with two_ranks(tmp_path, "preview.steps=1000", "preview.pictures=2000", "engine.hang_seconds=100") as (
        process,
        log,
    ):
        send_to_rank_1(signal.SIGTERM, when="step 0: held-out loss", process=process, log=log)
        assert process.wait(60) == 0, log.read_text()[-4000:]
    assert "stopped by SIGTERM after step 1 of 60, which is saved" in log.read_text()
