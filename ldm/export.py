"""Export a trained model to a layout of other programs: diffusers' folder, or Stable Diffusion's single file.

    python -m ldm.export runs/NAME my-weights --fp16
    python -m ldm.export sd-v1.safetensors my-folder --ema no
    python -m ldm.export my-folder my-model.safetensors --format single-file
    python -m ldm.export runs/NAME runs/NAME-0.13 --ema 0.13 --step 20000

Any model that txt2img.py --ckpt takes can be exported: a run (its newest model), a folder, a single file. A folder gets
a model card, README.md, written from the run's configuration, measures and samples.

The best length of the average of the weights is known only after training, by comparing samples. A run with
optim.ema_lengths=[0.05,0.1] keeps snapshots of two averages, every run.snapshot_every steps, from which --ema LENGTH
mixes any other, relative to the training up to that step: between 0 (only the last weights) and 0.289 (the mean of
all). Karras et al. 2023 (arXiv 2312.02696).
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import OneLineParser, run_command
from ldm.files.paths import user_path
from ldm.inference.flags import precision_argument
from ldm.inference.options import FORMATS
from ldm.interop.hub_cache import model_path

if TYPE_CHECKING:
    from ldm.model.components import ModelComponents

TOLERANCE = 0.1  # error of an average's profile above which to warn


def main(args: argparse.Namespace) -> None:
    import torch

    from ldm.interop.compvis.writing import check_target_file, write_single_file
    from ldm.interop.diffusers_layout.folder import check_target, write_folder
    from ldm.interop.model_card import files_beside
    from ldm.interop.read_back import check_written
    from ldm.interop.read_model import LoadOptions, read_model
    from ldm.model.precision import dtype_of

    (check_target if args.format == "diffusers" else check_target_file)(args.target)
    if args.fp16 and args.dtype not in ("fp16", None):
        raise ValueError(f"--fp16 and --dtype {args.dtype} ask for two precisions: give one of them")
    length = average_length(args.ema)
    if length is not None:
        parts = reconstructed(args.source, length, args.step)
    elif args.step is None:
        parts = read_model(args.source, LoadOptions(ema=args.ema == "yes"), dtype=torch.float32)
    else:
        raise ValueError(f"--step is {args.step}, but --ema is {args.ema}: give --ema an average's length, as 0.13")
    print(parts.describe(), flush=True)
    dtype = dtype_of("fp16" if args.fp16 else args.dtype or "fp32")
    check = partial(check_written, parts, dtype=dtype)
    if args.format == "diffusers":
        beside = files_beside(parts, args.source, name=args.target.resolve().name, dtype=dtype, length=length)
        write_folder(parts, args.target, dtype=dtype, beside=beside, check=check)
    else:
        write_single_file(parts, args.target, dtype=dtype, check=check)
    print(f"wrote {args.target}, and read it back: it is the same model")


def average_length(ema: str) -> float | None:
    """Parse the relative length of an average; None for yes and no. Raises ValueError for anything else."""
    try:
        return None if ema in ("yes", "no") else float(ema)
    except ValueError:
        raise ValueError(f"--ema is {ema!r}, expected yes, no, or an average's relative length, as 0.1") from None


def reconstructed(run: Path, length: float, step: int | None) -> ModelComponents:
    """Mix the average of this length up to this step (None: the last snapshot's) from a run's snapshots, and warn if
    they do not suffice. Raises ValueError or FileNotFoundError if it cannot be reconstructed."""
    from ldm.training.optim.averages import PowerProfile, Snapshot, mixture
    from ldm.training.optim.snapshot_files import mixed_components, read_snapshots

    if not run.is_dir():
        raise FileNotFoundError(f"there is no run {run}: give the folder of one, as runs/NAME")
    known = read_snapshots(run)
    if not known:
        raise ValueError(
            f"{run} has no snapshots (ema/*.safetensors): train with optim.ema_lengths=[0.05,0.1], or give --ema yes "
            "or no"
        )
    steps = [snapshot.step for snapshot in known]
    last = max(steps)
    wanted = Snapshot(last if step is None else step, length)
    if not 1 <= wanted.step <= last:
        raise ValueError(f"--step is {step}, expected 1 to {last}, the step of the last snapshot in {run}")
    PowerProfile(length)  # raises for a length out of range
    shares, error = mixture(list(known), wanted)
    print(f"mixing {len(known)} snapshots: the profile is off by {error:.2%}", flush=True)
    if error > TOLERANCE:
        nearest = min(steps, key=lambda known_step: abs(known_step - wanted.step))
        print(
            f"warning: the profile fits better at a step with a snapshot (as {nearest}), or a length nearer to those "
            "of the snapshots",
            file=sys.stderr,
        )
    return mixed_components(run, wanted, list(known.values()), shares)


def arguments() -> argparse.ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    parser.prog = "python -m ldm.export"
    add = parser.add_argument
    add("source", type=model_path, help="a run, as runs/NAME; a model's folder; or a single file")
    add("target", type=user_path, help="what to write; an older export there is replaced")
    add("--format", choices=FORMATS, default="diffusers", help="a folder (default), or one file and its .yaml")
    add("--dtype", type=precision_argument, metavar="NAME", help="of the weights: fp32 (default), bf16 or fp16")
    add("--fp16", action="store_true", help="half the size; the same as --dtype fp16")
    add("--ema", default="yes", metavar="WHICH",
        help="of a single file that holds both the averaged weights (yes, the default) or the others (no); of a run "
        "with snapshots the average of this relative length, as 0.1")  # fmt: skip
    add("--step", type=int, help="last training step of an average of --ema LENGTH (default: the last snapshot's)")
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, arguments()))
