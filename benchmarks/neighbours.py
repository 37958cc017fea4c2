"""Measure training on a CPU next to other programs: one process and two ranks, undisturbed and with one core busy.

    python benchmarks/neighbours.py --rounds 3
    python benchmarks/neighbours.py --rounds 3 --before

Each round trains configs/demo.yaml for --steps steps in each situation, one after the other, so that what else the
machine does slows all of them, and prints the median of their images/s. A busy core is a process that does nothing but
count. --before: with the threads and the waiting that PyTorch and the launcher choose by themselves. Variables that say
how OpenMP waits, such as GOMP_SPINCOUNT=10000, count as in training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TWO = [str(BIN / "deepspeed"), "--log_level", "critical", "--num_gpus", "2"]
LAUNCHERS = {"one process": [sys.executable], "two ranks": TWO}
BEFORE = {"GOMP_SPINCOUNT": "300000", "OMP_NUM_THREADS": str(os.cpu_count())}  # libgomp's default, in each rank
SHORT = ["preview.steps=1", "preview.pictures=1", "run.sample_every=10000", "run.log_every=2"]


def images_per_second(launcher: str, *, busy: bool, steps: int, variables: dict[str, str]) -> float:
    """Train, and return the median rate of the lines after the first, which contains the filling of the queues."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if busy:
            neighbour = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(neighbour.kill)
        words = ["--config", "configs/demo.yaml", f"run.folder={folder}", f"run.steps={steps}", *SHORT]
        command = [*LAUNCHERS[launcher], "ldm/train.py", *words]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | variables
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        lines = map(json.loads, Path(folder, "demo", "metrics.jsonl").read_text().splitlines())
        return statistics.median([line["images_per_second"] for line in lines if "images_per_second" in line][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--before", action="store_true")
    args = parser.parse_args()
    situations = [(launcher, busy) for busy in (False, True) for launcher in LAUNCHERS]
    found: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for launcher, busy in situations:
            name = f"{launcher}, {'beside a busy core' if busy else 'undisturbed'}"
            rate = images_per_second(launcher, busy=busy, steps=args.steps, variables=BEFORE if args.before else {})
            found.setdefault(name, []).append(round(rate, 1))
            print(f"{name}: {rate:.1f} images/s", flush=True)
    print(json.dumps({name: statistics.median(rates) for name, rates in found.items()}))


if __name__ == "__main__":
    main()
