"""Join the processes that train together, started by deepspeed, torchrun or plain python."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ldm.training.engine.cores import share_cores
from ldm.training.engine.distributed import Ranks
from ldm.training.engine.meeting import meet


def start_process(*, threads: int | None = None) -> Ranks:
    """Join the other processes (launched by deepspeed or torchrun; none under plain python), and choose the device.

    Call it once, before any tensor operation: denormals must be flushed before threads start. Otherwise the first
    steps of a zero-initialised transformer take seven times longer on a CPU. threads: of this process's CPU operations;
    None: see share_cores. Raises ValueError if the environment allows pickles in weights files: checkpoints contain
    none.
    """
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        raise ValueError("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, which allows files to run code: unset it")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.set_flush_denormal(True)
    share_cores(threads)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    # DeepSpeed compiles with ninja, which pip installs next to python: works without activating the environment.
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
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
            meet()
            # With it, DeepSpeed allocates shared memory for inference, 66 MB per rank, which outlives killed processes.
            os.environ.pop("LOCAL_SIZE", None)
            deepspeed.init_distributed(verbose=False)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise  # a rank that should have joined has ended
            raise ValueError(
                f"port {os.environ['MASTER_PORT']} is in use, perhaps by another training: start all ranks again with "
                "another, as deepspeed --master_port N does"
            ) from error
    # From here on faults.watchdog detects hangs: others may wait for minutes while one rank draws.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before PyTorch 2.14
    set_timeout(timedelta(days=7), dist.group.WORLD)
