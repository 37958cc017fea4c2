"""Launching engine_worker.py."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from helpers.forking import python_here
from helpers.launching import BIN, free_port

WORKER = Path(__file__).with_name("engine_worker.py")


def work(folder: Path, runs: dict[str, dict[str, Any]], *, ranks: int = 1) -> dict[str, Any]:
    """Run engine_worker.py in `ranks` processes, which do the named runs one after the other."""
    out = folder / f"out_{ranks}.json"
    out.unlink(missing_ok=True)
    words, port = [str(WORKER), json.dumps({"out": str(out), "runs": runs})], free_port()
    if ranks == 1:
        finished = python_here().complete(*words, environment={"OMP_NUM_THREADS": "1"})
    else:
        command = [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port, *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert out.exists(), finished.stdout[-2000:] + finished.stderr[-4000:]
    assert not list(Path("/dev/shm").glob(f"*_{port}_*")), "shared memory is left behind"
    return json.loads(out.read_text())
