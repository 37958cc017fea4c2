"""Reconstruct an average of the weights that was not kept in training, from a run's snapshots of other averages.

    python -m ldm.reconstruct runs/NAME runs/NAME-0.13 --length 0.13 [--step 20000]

The best length of the average is known only after training, by comparing samples. A run with
optim.ema_lengths=[0.05,0.1] keeps snapshots of two averages, every run.snapshot_every steps, from which this command
mixes any other length, relative to the training up to that step: between 0 (only the last weights) and 0.289 (the mean
of all). It writes a complete model, for txt2img.py --ckpt. Karras et al. 2023 (arXiv 2312.02696).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.parser import OneLineParser
from ldm.cli.run import run_command

if TYPE_CHECKING:
    from ldm.training.optim.post_hoc_ema import Snapshot

TOLERANCE = 0.1  # error of a profile above which to warn


def main(args: argparse.Namespace) -> None:
    import torch

    from ldm.interop.diffusers_layout.folder import check_target, write_folder
    from ldm.training.optim.post_hoc_ema import mixture
    from ldm.training.optim.snapshot_files import mixed_components, read_snapshots

    check_target(args.target)
    known = read_snapshots(args.run)
    wanted = check_wanted(args, list(known))
    made = mixture(list(known), wanted)
    print(f"mixing {len(known)} snapshots: the profile is off by {made.error:.2%}", flush=True)
    if made.error > TOLERANCE:
        print(
            f"warning: the profile fits better at a step with a snapshot (as {nearest_step(wanted, list(known))}), "
            "or a length nearer to those of the snapshots",
            file=sys.stderr,
        )
    parts = mixed_components(args.run, list(known.values()), made.shares)
    write_folder(parts, args.target, dtype=torch.float32)
    print(f"wrote {args.target}")


def check_wanted(args: argparse.Namespace, known: list[Snapshot]) -> Snapshot:
    """Return the requested average. Raises ValueError if it cannot be reconstructed from the run."""
    from ldm.training.optim.post_hoc_ema import Snapshot
    from ldm.training.optim.power_profile import PowerProfile

    if not args.run.is_dir():
        raise FileNotFoundError(f"there is no run {args.run}: give the folder of one, as runs/NAME")
    if not known:
        raise ValueError(f"{args.run} has no snapshots (ema/*.safetensors): train with optim.ema_lengths=[0.05,0.1]")
    last = max(snapshot.step for snapshot in known)
    step = last if args.step is None else args.step
    if not 1 <= step <= last:
        raise ValueError(f"--step is {step}, expected 1 to {last}, the step of the last snapshot in {args.run}")
    PowerProfile(args.length)
    return Snapshot(step, args.length)


def nearest_step(wanted: Snapshot, known: list[Snapshot]) -> int:
    return min((snapshot.step for snapshot in known), key=lambda step: abs(step - wanted.step))


def arguments() -> argparse.ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    parser.prog = "python -m ldm.reconstruct"
    parser.add_argument("run", type=Path, help="a run of ldm/train.py that kept snapshots")
    parser.add_argument("target", type=Path, help="the folder to write; it replaces an older model there")
    parser.add_argument("--length", type=float, required=True, help="relative length of the average, as 0.13")
    parser.add_argument(
        "--step", type=int, help="last training step of the average (default: that of the last snapshot)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, arguments()))
