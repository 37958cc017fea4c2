"""Where the processes of a launch meet: the store through which they find each other.

Launchers give an address and a port. The deepspeed launcher gives 29500 to every training, so a second one on the same
machine would fail, and its other ranks would connect to the first one's store. Where all ranks are processes of this
machine's launcher, rank 0 takes a free port instead, and announces it to the others.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ldm.errors import PeerError
from ldm.files.atomic import write_new
from ldm.training.engine.cores import local_ranks

LAUNCHER = b"deepspeed.launcher.launch"  # in the command line of the process that starts a machine's ranks
WAIT_SECONDS, POLL_SECONDS = 300.0, 0.05
PATIENCE = timedelta(minutes=30)  # with a rank that has not yet written what others read, as in PyTorch


def meet() -> None:
    """Initialise torch.distributed, unless the launcher's address is to be used as it is.

    Raises torch's DistNetworkError if a port cannot be used, and PeerError if rank 0 announces none.
    """
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        _meet_again()
    elif _is_hosted():  # by torchrun, which has found a port
        return
    elif os.environ["WORLD_SIZE"] == "1":
        _join(_host())
    elif local_ranks() == int(os.environ["WORLD_SIZE"]) and (launcher := launcher_of(os.getpid())) is not None:
        _meet_locally(launcher)


def _meet_again() -> None:
    """Join after torchrun restarted the processes: its store survives, and without a prefix PyTorch would find the
    addresses of the ended processes there."""
    hosts = os.environ["RANK"] == "0" and not _is_hosted()
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=hosts)
    _join(dist.PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store))


def _is_hosted() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _meet_locally(launcher: str) -> None:
    """Join the other ranks of a launch on this machine, through a file that they can all name and nobody else has."""
    notice = Path(tempfile.gettempdir(), f"latent-foundry-port-{os.getuid()}-{launcher}")
    if os.environ["RANK"] != "0":
        os.environ["MASTER_PORT"] = port = _announced(notice)
        _join(dist.TCPStore(os.environ["MASTER_ADDR"], int(port), is_master=False, timeout=PATIENCE))
        return
    store = _host()
    write_new(notice, os.environ["MASTER_PORT"].encode())
    try:
        _join(store)  # returns once all ranks have joined
    finally:
        notice.unlink(missing_ok=True)


def _host() -> dist.TCPStore:
    """Open the store on MASTER_PORT or, if that is in use or not given, on a free port, which MASTER_PORT becomes."""
    address, given = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", "0"))
    try:
        store = dist.TCPStore(address, given, is_master=True, timeout=PATIENCE)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        store = dist.TCPStore(address, 0, is_master=True, timeout=PATIENCE)
        warnings.warn(f"port {given} is in use, perhaps by another training: this one uses {store.port}", stacklevel=2)
    os.environ["MASTER_PORT"] = str(store.port)
    return store


def _announced(notice: Path) -> str:
    """Wait for the port that rank 0 announces. A file of another user does not count."""
    ends = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < ends:
        with contextlib.suppress(FileNotFoundError):
            if notice.lstat().st_uid == os.getuid() and (port := notice.read_text()):
                return port
        time.sleep(POLL_SECONDS)
    raise PeerError(f"rank 0 has not begun within {WAIT_SECONDS:.0f} seconds: start again, and look at its messages")


def _join(store: dist.Store) -> None:
    """Initialise torch.distributed as DeepSpeed does, but through this store."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda and ranks > 1 else None
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks, device_id=device)


def launcher_of(pid: int) -> str | None:
    """Name the process of the deepspeed launcher that a process descends from: its id, and when it started, in clock
    ticks since the machine did. None if there is none, or the system has no /proc."""
    for ancestor in _ancestors(pid):
        with contextlib.suppress(OSError):
            if LAUNCHER in Path(f"/proc/{ancestor}/cmdline").read_bytes().split(b"\0"):
                return f"{ancestor}-{_status(ancestor)[19]}"
    return None


def _ancestors(pid: int) -> Iterator[int]:
    """Yield the parent of a process, its parent, and so on."""
    with contextlib.suppress(OSError):
        while (pid := int(_status(pid)[1])) > 1:
            yield pid


def _status(pid: int) -> list[str]:
    """Return the fields of a process's status after its name, which may contain blanks: state, parent, and so on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
