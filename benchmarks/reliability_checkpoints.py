"""Damage checkpoints in the ways that disks and people do, and count what is detected.

    python benchmarks/reliability_checkpoints.py [--damages 1000] [--seed 0]
    python benchmarks/reliability_checkpoints.py --points

Two ranks' savers write the checkpoints of two steps. A copy of the newer one is damaged at a random place;
then the checkpoint from which a run would resume must be the older one. Damage to `latest`, which is for people, must
change nothing.

--points: instead, every file system call that a save makes, on either rank, fails because the disk is full, or is the
last before the process dies: before it, after it or, if it writes or removes much, half-way. The older checkpoint must
be unchanged, the new one complete or absent under its name, and the next save must succeed.

The exit code is 0 if all of it holds, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.checkpoint_damages import DAMAGES, LATEST_DAMAGES  # noqa: E402
from helpers.points import (  # noqa: E402
    NEW,
    RANK_1_FAILS,
    broken_promise,
    copy_of,
    points_of_a_save,
    points_of_giving_up,
    prepare_folder,
    ways,
)

from ldm.training.checkpoints.folders import fault  # noqa: E402
from ldm.training.checkpoints.select import choose  # noqa: E402
from ldm.training.engine.distributed import Ranks  # noqa: E402
from ldm.training.run import Run, RunConfig  # noqa: E402

ALONE = Ranks(0, 1, torch.device("cpu"))
OLDER, NEWER = f"step_{NEW - 2:07d}", f"step_{NEW - 1:07d}"


class Outcome:
    """How often a kind of damage was done, detected, and recovered from."""

    def __init__(self) -> None:
        self.done = self.found = self.recovered = 0

    def add(self, *, found: bool, recovered: bool) -> None:
        self.done, self.found, self.recovered = self.done + 1, self.found + found, self.recovered + recovered

    @property
    def holds(self) -> bool:
        return self.done == self.found == self.recovered


def gone_on_from(folder: Path) -> str | None:
    """Return the name of the checkpoint from which the run in this folder resumes, as training finds it."""
    run = Run(
        RunConfig(name=folder.parent.name, folder=str(folder.parent.parent), steps=9), is_main=True
    )
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            chosen = choose(run, ALONE)
        except Exception as error:  # counted, and named, as what it is: a run that does not go on
            return f"{type(error).__name__}: {error}"
    return None if chosen is None else chosen.name


def damage_one(folder: Path, damage: Callable[[Path, random.Random], None], draw: random.Random, outcome: Outcome):
    with copy_of(folder) as scratch:
        damage(scratch / NEWER, draw)
        newest = max(path for path in scratch.iterdir() if path.name.startswith("step_"))
        outcome.add(found=fault(newest) is not None, recovered=gone_on_from(scratch) == OLDER)


def damage_latest(folder: Path, damage: Callable[[Path], None], outcome: Outcome) -> None:
    """Nothing is to be found, and nothing to be fallen back from."""
    with copy_of(folder) as scratch:
        damage(scratch / "latest")
        outcome.add(found=fault(scratch / NEWER) is None, recovered=gone_on_from(scratch) == NEWER)


def count_damages(folder: Path, damages: int, draw: random.Random) -> bool:
    outcomes: dict[str, Outcome] = {}
    kinds = len(DAMAGES) + len(LATEST_DAMAGES)
    for number in range(max(damages, kinds)):
        place = number % kinds
        if place < len(DAMAGES):
            damage = DAMAGES[place]
            damage_one(folder, damage, draw, outcomes.setdefault(damage.__name__, Outcome()))
        else:
            harmless = LATEST_DAMAGES[place - len(DAMAGES)]
            damage_latest(folder, harmless, outcomes.setdefault(harmless.__name__, Outcome()))
    for name, outcome in outcomes.items():
        harmless = name.startswith("latest")
        what = "left the checkpoint good" if harmless else "found"
        then = "gone on from it" if harmless else "gone on from the one before"
        told = f"{outcome.done:6d} done  {outcome.found:6d} {what}  {outcome.recovered:6d} {then}"
        print(f"{name.replace('_', ' '):36s}{told}", flush=True)
    done, found, recovered = (sum(getattr(o, k) for o in outcomes.values()) for k in ("done", "found", "recovered"))
    print(f"all together: {done} damages, {found} judged as they are, {recovered} runs went on from the last good one")
    return all(outcome.holds for outcome in outcomes.values())


def count_points(folder: Path) -> bool:
    done, held = Counter[str](), Counter[str]()
    points, after = points_of_a_save(folder), points_of_giving_up(folder)
    for point in [*points, *after]:
        for how in ways(point):
            done[how] += 1
            wrong = broken_promise(folder, {point: how} | ({RANK_1_FAILS: "half"} if point in after else {}))
            held[how] += wrong is None
            if wrong is not None:
                print(f"{point}: {how}: {wrong}", flush=True)
    for how in done:
        print(f"{how:20s}{done[how]:6d} done  {held[how]:6d} held")
    calls = len(points) + len(after)
    print(f"all together: {done.total()} failures at {calls} calls, {held.total()} of which cost only their save")
    return done == held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, default=1000, help="how many, of all kinds in turn (one each at least)")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--points", action="store_true", help="let every call of a save fail instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "trial" / "checkpoints"
        prepare_folder(folder)
        holds = count_points(folder) if args.points else count_damages(folder, args.damages, random.Random(args.seed))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
