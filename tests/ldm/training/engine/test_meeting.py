"""Processes of one launch find each other, whatever else uses the launcher's port. A stand-in is the launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.forking import ROOT
from helpers.launching import free_port

from ldm.errors import PeerError
from ldm.training.engine import meeting

RANK = """
import os, pathlib, time, warnings, torch
import torch.distributed as dist
from ldm.training.engine.meeting import meet
say = lambda line: os.write(1, f"{line}\\n".encode())  # at once: the ranks share a pipe
warnings.showwarning = lambda message, *rest: say(f"warning: {message}")
meet()
total = torch.tensor([10.0 ** dist.get_rank()])
dist.all_reduce(total)
say(f"{int(total)} {os.environ['MASTER_PORT']}")
if "GO" in os.environ:  # stay until the test says so
    go = pathlib.Path(os.environ["GO"])
    go.with_name(os.environ["MASTER_PORT"]).touch()
    while not go.exists():
        time.sleep(0.05)
dist.destroy_process_group()
"""
LAUNCHER = """
import os, subprocess, sys
ranks = [
    subprocess.Popen([sys.executable, "-c", sys.argv[2]], env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    for rank in (1, 0)
]
sys.exit(max(rank.wait() for rank in ranks))
"""


@pytest.fixture
def taken() -> Iterator[str]:
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        yield str(held.getsockname()[1])


def launch(port: str, *, world: int = 2) -> subprocess.Popen[str]:
    """Start two local ranks of a world of this size, as `python -m deepspeed.launcher.launch` does."""
    variables = {"WORLD_SIZE": str(world), "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", LAUNCHER, "deepspeed.launcher.launch", RANK]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment | variables, text=True, stdout=pipe, stderr=pipe)


def lines(launched: subprocess.Popen[str]) -> list[str]:
    out, err = launched.communicate(timeout=200)
    assert launched.returncode == 0, err[-2000:]
    return sorted(out.splitlines())


def test_a_port_in_use_is_answered_by_a_free_one(taken):
    first, second, warning = lines(launch(taken))
    assert first == second and first.startswith("11 ")
    port = first.split()[1]
    assert port != taken
    assert warning == f"warning: port {taken} is in use, perhaps by another training: this one uses {port}"
    assert not list(Path(tempfile.gettempdir()).glob(f"latent-foundry-port-{os.getuid()}-*"))


def test_two_trainings_that_start_at_once_do_not_mix(tmp_path, monkeypatch):
    monkeypatch.setenv("GO", str(tmp_path / "go"))
    port, ends = free_port(), time.monotonic() + 150
    launched = [launch(port), launch(port)]
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < ends:  # one file for each port
        time.sleep(0.1)
    (tmp_path / "go").touch()
    both = [lines(one) for one in launched]
    sums = [[line for line in own if not line.startswith("warning")] for own in both]
    assert all(len(own) == 2 and own[0] == own[1] and own[0].startswith("11 ") for own in sums)
    assert sums[0] != sums[1] and sum(map(len, both)) == 5  # one warning


def test_a_single_process_takes_a_free_port(taken, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", taken)
    with pytest.warns(UserWarning, match=f"port {taken} is in use, perhaps by another training: this one uses"):
        store = meeting._host()
    assert os.environ["MASTER_PORT"] == str(store.port) != taken
    monkeypatch.delenv("MASTER_PORT")
    assert meeting._host().port != 0


def test_where_ranks_run_on_other_machines_the_address_stays(monkeypatch):
    for name, value in {"WORLD_SIZE": "4", "LOCAL_SIZE": "2", "RANK": "1", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(meeting, "launcher_of", lambda pid: "1-1")
    monkeypatch.setattr(meeting, "_meet_locally", lambda launcher: pytest.fail("not all ranks are local"))
    meeting.meet()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    meeting.meet()
    assert os.environ["MASTER_PORT"] == "7"


def test_the_launcher_is_found_among_the_ancestors_and_told_apart_by_its_start():
    script = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', sys.argv[2]]))"
    say = (
        "import os; from ldm.training.engine.meeting import launcher_of; print(launcher_of(os.getpid()), os.getppid())"
    )
    wrapped = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {say!r}]))"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", script, "deepspeed.launcher.launch", wrapped]
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE) as launched:
        out, _ = launched.communicate(timeout=120)
    name, parent = out.split()
    pid, started = name.split("-")
    assert int(pid) == launched.pid != int(parent) and started.isdigit()
    assert meeting.launcher_of(os.getpid()) is None


def test_a_notice_of_somebody_else_does_not_count(tmp_path, monkeypatch):
    notice = tmp_path / "notice"
    notice.write_text("29511")
    assert meeting._announced(notice) == "29511"
    monkeypatch.setattr(os, "getuid", lambda: notice.stat().st_uid + 1)
    monkeypatch.setattr(meeting, "WAIT_SECONDS", 0.1)
    with pytest.raises(PeerError, match="rank 0 has not begun within"):
        meeting._announced(notice)
