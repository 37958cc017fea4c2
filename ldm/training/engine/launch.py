"""Join the processes that train together, started by deepspeed, torchrun or plain python."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ldm.training.engine.distributed import Ranks


def start_process() -> Ranks:
    """Join the other processes (launched by deepspeed or torchrun; none under plain python), and choose the device.

    Call it once, before any tensor operation: denormals must be flushed before threads start. Otherwise the first
    steps of a zero-initialised transformer take seven times longer on a CPU. Raises ValueError if the environment
    allows pickles in weights files: checkpoints contain none.
    """
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        raise ValueError("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, which allows files to run code: unset it")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.set_flush_denormal(True)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    # DeepSpeed compiles with ninja, which pip installs next to python: works without activating the environment.
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    # With it, DeepSpeed allocates shared memory for inference on CPUs, 66 MB per rank, which outlives killed processes.
    os.environ.pop("LOCAL_SIZE", None)
    if os.environ["RANK"] == "0":
        print("starting DeepSpeed (which compiles a helper the first time: half a minute)", flush=True)
    _join()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _join() -> None:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns if there is no CUDA
    # DeepSpeed calls functions that PyTorch has renamed: each rank would warn between the progress lines.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        try:
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
                _meet_again()
            deepspeed.init_distributed(verbose=False)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise  # a rank that should have joined has ended
            raise ValueError(
                f"port {os.environ['MASTER_PORT']} is in use, perhaps by another training: start this one with "
                "deepspeed --master_port N, or torchrun --standalone"
            ) from error
    # From here on faults.watchdog detects hangs: others may wait for minutes while one rank draws.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before PyTorch 2.14
    set_timeout(timedelta(days=7), dist.group.WORLD)


def _meet_again() -> None:
    """Join after torchrun restarted the processes: its store survives, and without a prefix PyTorch would find the
    addresses of the ended processes there."""
    environment = os.environ
    hosts = environment["RANK"] == "0" and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=hosts)
    store = dist.PrefixStore(f"attempt_{environment['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    rank, ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
