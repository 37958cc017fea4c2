"""Count what a run survives: real processes on real DeepSpeed, killed, stopped, interrupted.

    python benchmarks/reliability.py --kills 200 --points 200 --signals 50 --hangs 10 --ranks 2 --disks 10

Each kind prints one line; the exit code is 1 if anything was lost. docs/reliability.md has the figures.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # in this order: tests/ has folders of the packages' names

from faults import PEER_ERROR, Job, final_state, import_everything, order, order_file, start  # noqa: E402
from helpers.points import Calls, How, Point  # noqa: E402

from ldm.files.checkpoints import Checkpoints, fault  # noqa: E402

SETTINGS = [(ranks, stage) for stage in (0, 2, 3) for ranks in (1, 2)]  # of the kills
LONGEST = 120.0  # seconds for one start
KILLS_A_RUN = 8


def finish(job: Job) -> list[int | None]:
    codes = job.wait(LONGEST)
    job.end()
    return codes


def undisturbed(folder: Path, ranks: int, stage: int, words: list[str]) -> tuple[Path, float]:
    """Run without faults, to compare with. Returns the run and the seconds that it took."""
    began = time.monotonic()
    name = f"whole_{ranks}_{stage}"
    job = start(folder, name, ranks=ranks, words=[f"engine.zero_stage={stage}", *words])
    codes = finish(job)
    if codes != [0] * ranks:
        sys.exit(f"the run without faults ended with {codes}:\n{job.log.read_text()[-3000:]}")
    return folder / name, time.monotonic() - began


def different(run: Path, whole: Path, ranks: int) -> list[str]:
    """List how the end of a run differs from that of the one without faults."""
    found, expected = final_state(run), final_state(whole)
    wrong = [name for name in expected if found[name] != expected[name]]
    return wrong + (["order"] if order(run, ranks) != order(whole, ranks) else [])


def kill_at_random(job: Job, draw: random.Random, seconds: float, told: Counter[str], survivors: list[float]) -> bool:
    """Kill one rank or all within so many seconds, and check the others. Returns whether the run had ended."""
    time.sleep(draw.uniform(0.0, seconds))
    if all(code == 0 for code in job.wait(0.02)):
        return True
    ranks = len(job.pids)
    victims = [draw.randrange(ranks)] if draw.random() < 0.5 else list(range(ranks))
    killed_at = time.monotonic()
    for rank in victims:
        job.kill(rank, signal.SIGKILL)
    told["kills"] += 1
    codes = job.wait(10)
    # Before all ranks have met nobody can know of the others: that is for a launcher, as which this acts here.
    met = "M parameters" in job.log.read_text().rpartition("starting DeepSpeed")[2]
    if len(victims) < ranks and met:
        survivors.append(time.monotonic() - killed_at)
        if any(code not in (PEER_ERROR, 0, -9) for code in codes):
            told["wrong codes"] += 1
            print(f"after rank {victims[0]} was killed: codes {codes}\n{job.log.read_text()[-3000:]}", flush=True)
    job.end()
    return False


def kills(count: int, folder: Path, seed: int) -> bool:
    """Kill one rank or all at random times (kill -9), and start the same command again until the run has ended."""
    draw, told, survivors = random.Random(seed), Counter(), []
    wholes: dict[tuple[int, int], tuple[Path, float]] = {}
    number = 0
    while told["kills"] < count:
        setting = SETTINGS[number % len(SETTINGS)]
        if setting not in wholes:
            wholes[setting] = undisturbed(folder, *setting, [])
        (ranks, stage), (whole, seconds) = setting, wholes[setting]
        name, number = f"killed_{number}", number + 1
        for attempt in range(KILLS_A_RUN + 1):
            job = start(folder, name, ranks=ranks, words=[f"engine.zero_stage={stage}"])
            if attempt == KILLS_A_RUN or kill_at_random(job, draw, seconds, told, survivors):
                break
        codes = finish(job)
        wrong = different(folder / name, whole, ranks) if codes == [0] * ranks else [f"codes {codes}"]
        left = [path.name for path in (folder / name).rglob("*.partial")]
        told["runs"] += 1
        told["equal"] += not wrong and not left
        if wrong or left:
            print(f"{name}, {ranks} ranks, ZeRO {stage}: {wrong} {left}\n{job.log.read_text()[-2000:]}")
        shutil.rmtree(folder / name, ignore_errors=True)
        print(f"  kills {told['kills']}, runs {told['runs']}, equal {told['equal']}", flush=True)
    longest = max(survivors, default=0.0)
    print(
        f"kills: {told['kills']} in {told['runs']} runs, {told['equal']} ended bit for bit as without them; "
        f"other ranks out within {longest:.1f} s, wrong codes {told['wrong codes']}"
    )
    return told["equal"] == told["runs"] and longest < 5 + 1


def signals(count: int, folder: Path, seed: int) -> bool:
    """Send SIGTERM or SIGINT at random times to one rank or all: saved, ended within 10 s, code 0, no step lost."""
    draw, told, slowest = random.Random(seed + 1), Counter(), 0.0
    whole, seconds = undisturbed(folder, 2, 2, ["run.steps=200", "run.checkpoint_every=100000"])
    for number in range(count):
        name, words = f"asked_{number}", ["engine.zero_stage=2", "run.steps=200", "run.checkpoint_every=100000"]
        job = start(folder, name, ranks=2, words=words)
        time.sleep(draw.uniform(0.0, seconds * 0.9))
        sent, began = draw.choice([signal.SIGTERM, signal.SIGINT]), time.monotonic()
        asked = draw.choice([[0], [1], [0, 1]])
        met = job.log.exists() and "M parameters" in job.log.read_text()
        for rank in asked if met else [0, 1]:  # before they have met, no rank can tell another
            job.kill(rank, sent)
        codes = job.wait(LONGEST)
        took = time.monotonic() - began
        job.end()
        run = folder / name
        used = max(order(run, 2), default=-1) + 1 if order_file(run, 2, 0).exists() else 0
        steps = [int(path.name[5:]) for path in run.glob("checkpoints/step_*")]
        saved = max(steps, default=0) == used
        early = used == 0  # before the first step, where ranks may leave one after the other
        good = saved and (codes == [0, 0] or early and set(codes) <= {0, PEER_ERROR})
        told["good"] += good
        told["early"] += early
        slowest = max(slowest, took)
        if not good:
            print(f"{name}: {sent.name}, codes {codes}, used {used}, saved {steps}\n{job.log.read_text()[-1500:]}")
        elif number % 10 == 0:  # and it goes on
            codes = finish(start(folder, name, ranks=2, words=words))
            told["not equal after"] += bool(codes != [0, 0] or different(run, whole, 2))
        shutil.rmtree(run, ignore_errors=True)
        print(f"  signals {number + 1}, good {told['good']}, slowest {slowest:.1f} s", flush=True)
    print(
        f"signals: {count}, of which {told['early']} before the first step; {told['good']} left with everything saved, "
        f"the slowest after {slowest:.1f} s; gone on differently: {told['not equal after']}"
    )
    return told["good"] == count and slowest <= 10 and not told["not equal after"]


def hangs(count: int, folder: Path, seed: int) -> bool:
    """Stop a rank (SIGSTOP): it is named, and all processes end, within the timeout of 6 s plus 5."""
    draw, told, slowest = random.Random(seed + 2), Counter(), 0.0
    for number in range(count):
        job = start(folder, f"hung_{number}", ranks=2, words=["engine.zero_stage=2", "run.steps=100000"])
        while "step 5/" not in job.log.read_text() if job.log.exists() else True:
            time.sleep(0.1)
        time.sleep(draw.uniform(0, 1))
        rank = number % 2
        job.kill(rank, signal.SIGSTOP)
        began = time.monotonic()
        codes = job.wait(60)
        slowest = max(slowest, time.monotonic() - began)
        named = f"rank {rank}" in job.log.read_text().rpartition("error: ")[2]
        told["good"] += named and codes[1 - rank] == PEER_ERROR and None not in codes
        job.end()
        shutil.rmtree(folder / f"hung_{number}", ignore_errors=True)
    print(f"hangs: {count}, {told['good']} named and ended, the slowest after {slowest:.1f} s (timeout: 6)")
    return told["good"] == count and slowest <= 11


def ranks(count: int, folder: Path, seed: int) -> bool:
    """Change ranks, 1 -> 2 -> 1: the same samples in the same order, and after 50 more steps the same loss."""
    good = True
    for stage in (2, 3)[:count]:
        words = ["run.log_every=1", "run.checkpoint_every=20"]
        whole, _ = undisturbed(folder, 1, stage, [*words, "run.steps=90"])
        run = folder / f"moved_{stage}"
        for number, steps in ((1, 20), (2, 40), (1, 90)):
            own = [*words, f"engine.zero_stage={stage}", f"run.steps={steps}"]
            job = start(folder, run.name, ranks=number, words=own)
            if finish(job) != [0] * number:
                sys.exit(job.log.read_text()[-3000:])
        same = order(run, 1) | order(run, 2) == order(whole, 1)
        pairs = list(zip(losses(run), losses(whole), strict=True))
        off = max(abs(mine - other) / other for mine, other in pairs)
        print(f"ranks 1 -> 2 -> 1, ZeRO {stage}: order {'equal' if same else 'NOT equal'}, loss off by {off:.1e} "
              f"at most over {len(pairs)} steps")  # fmt: skip
        good &= same and off <= 1e-6
    return good


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def disks(count: int, folder: Path, seed: int) -> bool:
    """A full disk: on either rank, at random saves, training goes on and ends as without; at all saves, it stops with
    code 4 and the checkpoint before is whole."""
    draw, good = random.Random(seed + 3), 0
    whole, _ = undisturbed(folder, 2, 2, [])
    for number in range(count):
        victim, failing = draw.randrange(2), {draw.randrange(1, 8)}
        job = start(folder, f"full_{number}", ranks=2, words=["engine.zero_stage=2"],
                    before=lambda rank, own=victim, bad=failing: fill_disk(bad if rank == own else set()))  # fmt: skip
        codes = finish(job)
        told = job.log.read_text()
        good += codes == [0, 0] and "could not be written" in told and not different(folder / job.log.stem, whole, 2)
        shutil.rmtree(folder / job.log.stem)
    job = start(folder, "full", ranks=2, words=["engine.zero_stage=2"],
                before=lambda rank: fill_disk(set(range(3, 99)) if rank == 1 else set()))  # fmt: skip
    codes = finish(job)
    newest = Checkpoints(folder / "full/checkpoints", keep=1).all()[-1]
    stopped = codes == [4, 4] and newest.name == "step_0000010" and fault(newest) is None
    print(f"full disks: {good} of {count} cost only that checkpoint; for good: codes {codes}, {newest.name} is "
          f"{'whole' if stopped else 'NOT as it should be'}")  # fmt: skip
    return good == count and stopped


def fill_disk(saves: set[int]) -> None:
    """Let the disk be full at the numbered saves of this process, counted from 1."""
    import ldm.training.checkpoints.saver as saver

    plain, counted = saver.write_fragments, iter(range(1, 10**6))

    def failing(*arguments: object) -> None:
        if next(counted) in saves:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(*arguments)

    saver.write_fragments = failing


class RealCalls(Calls):
    """Real calls: this process dies at them; every call is recorded at once."""

    def __init__(self, folder: Path, faults: dict[Point, How], listing: Path) -> None:
        super().__init__(folder, faults)
        self.listing = listing

    def _call(self, name: str, target: Path, *call: Any) -> Any:
        with self.listing.open("a") as file:
            file.write(f"{name}\t{target.name}\t{self._counts[name, target.name] + 1}\n")
        return super()._call(name, target, *call)

    def die(self) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("alive")


def calls_of_second_save(listing: Path) -> list[Point]:
    """Return the calls of one rank, whose saves each begin with the same call."""
    found = [line.split("\t") for line in listing.read_text().splitlines()]
    listed = [Point(call, target, int(number)) for call, target, number in found]
    begins = [n for n, point in enumerate(listed) if point.call == "save_file"]
    return listed[begins[1] : begins[2]]


def points(count: int, folder: Path, seed: int) -> bool:
    """At the calls of the file system that a save makes, on either rank: kill -9 before it or after it, or a full disk.
    The run, started again if it must be, ends as without it."""
    words = ["engine.zero_stage=2", "run.steps=15"]
    whole, _ = undisturbed(folder, 2, 2, words)

    def run(name: str, victim: int, faults: dict[Point, How]) -> tuple[list[int | None], Job]:
        def before(rank: int) -> None:
            own = faults if rank == victim else {}
            RealCalls(folder / name / "checkpoints", own, folder / f"{name}_{rank}.txt").__enter__()

        job = start(folder, name, ranks=2, words=words, before=before)
        return finish(job), job

    run("listed", -1, {})
    of_ranks = [calls_of_second_save(folder / f"listed_{rank}.txt") for rank in range(2)]
    hows: tuple[How, ...] = ("death before", "death after", "full")
    cases = [(rank, point, how) for rank, own in enumerate(of_ranks) for point in own for how in hows]
    random.Random(seed + 4).shuffle(cases)
    good = 0
    for number, (rank, point, how) in enumerate(cases[:count]):
        codes, job = run(f"point_{number}", rank, {point: how})
        if codes != [0, 0]:
            codes = finish(start(folder, job.log.stem, ranks=2, words=words))
        wrong = different(folder / job.log.stem, whole, 2) if codes == [0, 0] else [f"codes {codes}"]
        good += not wrong
        if wrong:
            print(f"rank {rank}, {point}, {how}: {wrong}\n{job.log.read_text()[-1500:]}", flush=True)
        shutil.rmtree(folder / job.log.stem)
    done = min(count, len(cases))
    calls = sum(map(len, of_ranks))
    print(f"save points: {calls} calls on two ranks, {done} faults of {len(cases)}: {good} runs ended as without them")
    return good == done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("kills", "points", "signals", "hangs", "ranks", "disks"):
        parser.add_argument(f"--{name}", type=int, default=0)
    parser.add_argument("--setting", type=int, nargs=2, metavar=("RANKS", "STAGE"), help="of all kills; default: six")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=None, help="where runs are made; default: a temporary folder")
    args = parser.parse_args()
    if args.setting:
        SETTINGS[:] = [tuple(args.setting)]
    folder = args.folder or Path(tempfile.mkdtemp(prefix="reliability-"))
    import_everything()
    good = True
    for kind in (kills, points, signals, hangs, ranks, disks):
        count = getattr(args, kind.__name__)
        if count:
            good &= kind(count, folder / kind.__name__, args.seed)
    if args.folder is None:
        shutil.rmtree(folder)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
