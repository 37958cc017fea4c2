"""Count what a run survives on disks that really fail: full, stalled, or without power.

    python benchmarks/reliability_storage.py --runs 30

Each run has an ext4 of its own, in a file, on which at a random time one of these happens (root is needed):

    full      a file takes all that is left, for a while
    stalled   all that writes waits, for a while
    power     what was not yet on the disk is gone, and nothing can be written any more; the disk is mounted again

The same command is started until the run has ended, which must be bit for bit as without the fault. The exit code is 1
if anything was lost.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from faults import final_state, import_everything, order, start  # noqa: E402
from helpers.disks import cut_power, restore_power, slow_disk, stall  # noqa: E402
from reliability import LONGEST, finish, undisturbed  # noqa: E402

RANKS, WORDS = 2, ["engine.zero_stage=2"]
MEBIBYTES = 192  # the export of a preview has 41
LONGEST_FAULT = 4.0  # seconds
STARTS = 5


def full(disk: Path, seconds: float) -> None:
    filler = disk / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    time.sleep(seconds)
    filler.unlink()


FAULTS = {"full": full, "stalled": stall, "power": lambda disk, seconds: cut_power(disk)}


def survives(name: str, kind: str, whole: Path, folder: Path, moment: float, seconds: float, told: Counter[str]) -> str:
    """Train on a disk with one fault; returns what is wrong in the end, "" if nothing."""
    with slow_disk(MEBIBYTES) as disk:
        job = start(folder, name, ranks=RANKS, words=[*WORDS, f"run.folder={disk}"])
        codes = job.wait(moment)
        FAULTS[kind](disk, seconds)
        codes = job.wait(LONGEST)
        job.end()
        ended = codes == [0] * RANKS and kind != "power"  # without power, what was written last may be lost
        told[f"{kind} ended by themselves"] += ended
        if kind == "power":
            restore_power(disk)
        for _ in range(STARTS):
            if not ended:
                codes = finish(start(folder, name, ranks=RANKS, words=[*WORDS, f"run.folder={disk}"]))
                ended = codes == [0] * RANKS
        if not ended:
            return f"codes {codes}"
        found, expected = final_state(disk / name), final_state(whole)
        wrong = [key for key in expected if found[key] != expected[key]]
        return ", ".join(wrong + ["order"] * (order(folder / name, RANKS) != order(whole, RANKS)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    import_everything()
    draw, told, lost = random.Random(args.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory(prefix="reliability-") as place:
        folder = Path(place)
        whole, took = undisturbed(folder, RANKS, 2, [])
        for number in range(args.runs):
            kind, name = list(FAULTS)[number % len(FAULTS)], f"run_{number}"
            moment, seconds = draw.uniform(1.0, 1.2 * took), draw.uniform(0.2, LONGEST_FAULT)
            wrong = survives(name, kind, whole, folder, moment, seconds, told)
            told[kind] += 1
            told[f"{kind} equal"] += not wrong
            lost += bool(wrong)
            print(f"  {name}, {kind} after {moment:.1f} s for {seconds:.1f} s: {wrong or 'equal'}", flush=True)
            if wrong:
                print((folder / f"{name}.log").read_text()[-3000:], flush=True)
    for kind in FAULTS:
        alone = "" if kind == "power" else f", {told[f'{kind} ended by themselves']} without another start"
        print(f"{kind}: {told[f'{kind} equal']} of {told[kind]} runs ended bit for bit as without it{alone}")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main())
