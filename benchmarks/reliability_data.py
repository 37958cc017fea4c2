"""Check at length that no data is lost: random plans of order and resumption, and damaged shards read to their end.

    python benchmarks/reliability_data.py                      10,000 plans and 2,000 shards: minutes
    python benchmarks/reliability_data.py --plans 100 --shards 100 --seed 7

A plan draws shards of uneven sizes, one to three sets, lanes, ranks, threads, and where the run is stopped and
resumed with how many ranks. It holds if each set's samples come once per epoch, all ranks' batches are equally large,
and the order is the same on any number of ranks, by any number of threads and from any position. A damaged shard,
read next to a sound one, holds if each sample of its manifest is delivered or rejected and listed, no more are lost
than the damage can have hit, none of the sound one are; if nothing is raised, in time, and nothing is written. Exits
with 1 where one does not hold, and prints the seed that repeats it.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tqdm import tqdm

SECONDS = 10  # for one shard
MEMORY = 200 << 20  # bytes by which reading all of them may grow the process
CHECKS = Path(__file__).parents[1] / "tests"  # the suite runs the same, fewer of them


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeoutError if the block takes longer."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def resident() -> int:
    """Return the bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run(kind: str, seeds: range, check: Callable[[int], str], seconds: float) -> bool:
    """Check each seed; print each that does not hold, and a line about all. Returns whether all hold."""
    began, failed, found = time.monotonic(), 0, Counter[str]()
    for seed in tqdm(seeds, unit=kind, disable=None):
        try:
            with limited(seconds):
                found[check(seed)] += 1
        except Exception as error:
            failed += 1
            print(f"{kind} {seed}: {type(error).__name__}: {error}", flush=True)
    told = ", ".join(f"{count} {name}" for name, count in sorted(found.items()))
    print(f"{kind}s: {len(seeds) - failed} of {len(seeds)} hold ({told}), {time.monotonic() - began:.0f} s", flush=True)
    return failed == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=10_000)
    parser.add_argument("--shards", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first; each next one has the next")
    args = parser.parse_args()
    sys.path[:0] = [str(CHECKS.parent), str(CHECKS)]  # tests/ has folders of the packages' names
    from helpers.plans import check_plan
    from helpers.shard_damages import check_shard

    def plan(seed: int) -> str:
        check_plan(seed)
        return "exact"

    good = run("plan", range(args.seed, args.seed + args.plans), plan, seconds=60)
    with tempfile.TemporaryDirectory() as folder:
        check_shard(0, Path(folder))  # what is loaded once is no growth
        before = resident()

        def shard(seed: int) -> str:
            for path in Path(folder).iterdir():
                path.unlink()
            return check_shard(seed, Path(folder))

        good &= run("shard", range(args.seed, args.seed + args.shards), shard, seconds=SECONDS)
        growth = resident() - before
        print(f"memory: {growth / 2**20:+.0f} MiB after all shards, at most {MEMORY >> 20} allowed", flush=True)
    return 0 if good and growth < MEMORY else 1


if __name__ == "__main__":
    sys.exit(main())
