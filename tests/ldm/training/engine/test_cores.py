"""How many threads a rank takes of a machine that others use as well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.forking import ROOT

from ldm.cli import WAITING
from ldm.training.engine import cores

V2, V1 = "0::/a.slice/job\n", "9:name=systemd:/x\n4:memory:/y\n1:cpu,cpuacct:/a.slice/job\n0::/\n"


def machine(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, content in {"proc/self/cgroup": groups, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        (V2, {"a.slice/job/cpu.max": "250000 100000\n"}, 2.5),
        (V2, {"a.slice/job/cpu.max": "max 100000\n", "a.slice/cpu.max": "max 100000\n"}, None),
        (V2, {"a.slice/job/cpu.max": "400000 100000\n", "a.slice/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3.0),  # in a container, which sees its own group as the root
        ("0::/elsewhere\n", {"cpu.max": "300000 100000\n"}, 3.0),
        (V1, {"cpu/a.slice/job/cpu.cfs_quota_us": "200000\n", "cpu/a.slice/job/cpu.cfs_period_us": "100000\n"}, 2.0),
        (V1, {"cpu/a.slice/job/cpu.cfs_quota_us": "-1\n", "cpu/a.slice/job/cpu.cfs_period_us": "100000\n"}, None),
        (V1, {"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        (V1, {}, None),
        (V2, {"a.slice/job/cpu.max": "nonsense\n"}, None),
    ],
)
def test_a_quota_is_that_of_the_group_and_of_those_above(groups, files, quota, tmp_path):
    files = {f"sys/fs/cgroup/{name}": content for name, content in files.items()}
    assert cores.cpu_quota(machine(tmp_path, groups, files)) == quota


def test_a_system_without_cgroups_has_no_quota(tmp_path):
    assert cores.cpu_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("variables", "quota", "threads", "expected"),
    [
        ({}, None, None, None),  # one process: as PyTorch chooses
        ({"LOCAL_SIZE": "2"}, None, None, 4),
        ({"LOCAL_WORLD_SIZE": "3"}, None, None, 2),
        ({"LOCAL_SIZE": "16"}, None, None, 1),
        ({}, 2.9, None, 2),
        ({}, 0.5, None, 1),
        ({}, 64.0, None, None),
        ({"LOCAL_SIZE": "2"}, 6.0, None, 3),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "8"}, 2.0, None, None),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "8"}, 2.0, 5, 5),
    ],
)
def test_ranks_share_the_cores_unless_the_user_says_otherwise(variables, quota, threads, expected, monkeypatch):
    chosen: list[int] = []
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    cores.share_cores(threads)
    assert chosen == ([] if expected is None else [expected])


SAY = """
import argparse, os
from ldm.cli import run_command
def main(args):
    import torch
    from ldm.training.engine.cores import share_cores
    share_cores(None)
    print(torch.get_num_threads(), os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
parser = argparse.ArgumentParser()
parser.add_argument("--debug")
run_command(main, parser, [])
"""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, "1 passive 1000"),  # the affinity is one core
        ({"OMP_WAIT_POLICY": "active"}, "1 active None"),
        ({"KMP_BLOCKTIME": "0", "OMP_NUM_THREADS": "1"}, "1 None None"),
    ],
)
def test_affinity_and_the_users_own_waiting_count(variables, said):
    core = min(os.sched_getaffinity(0))
    script = f"import os; os.sched_setaffinity(0, {{{core}}})\n{SAY}"
    names = ("OMP_NUM_THREADS", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", *WAITING)
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"} | variables
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, said), done.stderr
