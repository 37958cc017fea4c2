"""Stop trainings at random, read what they leave in every way that there is, and count what is not their newest state.

    python benchmarks/reliability_readers.py [--stops 100] [--seed 0]

An autoencoder, a text encoder and a denoiser are trained in turn and end after a random step: by SIGINT, SIGTERM,
SIGKILL or by themselves; after some, the newest checkpoint is damaged. Then the run is loaded, exported, and used by
another training: each time the weights must be, bit for bit, the averaged ones of the newest valid checkpoint, one line
must say which step that is, the model card must count the pictures up to it, and no file of the run may change.

The exit code is 0 if all of it holds, else 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.emoji import write_few_emoji  # noqa: E402
from helpers.stopped_runs import Workshop, check_readers, random_stops  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stops", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the steps")
    parser.add_argument("--first", type=int, default=0, help="leave out the stops before this one")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "checkpoint .* is damaged")
    done, held = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        shards = Path(scratch) / "shards"
        shards.mkdir()
        workshop = Workshop(Path(scratch), write_few_emoji(shards), ROOT / "weights" / "emoji64")
        for stop in random_stops(args.stops, args.seed)[args.first :]:
            kind = f"{stop.training} {stop.signal}{' and a damage' * stop.damage}"
            done[kind] += 1
            try:
                step = check_readers(workshop, stop)
            except Exception:  # counted, and shown
                traceback.print_exc()
                continue
            held[kind] += 1
            print(f"{kind} at step {stop.step}: read as of step {step}", flush=True)
    for kind in sorted(done):
        print(f"{kind:30s}{done[kind]:4d} stops  {held[kind]:4d} read as their newest checkpoint")
    print(f"all together: {done.total()} stops, {held.total()} read as their newest checkpoint")
    return 0 if done == held else 1


if __name__ == "__main__":
    sys.exit(main())
