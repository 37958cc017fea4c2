"""Export a trained model to a layout of other programs: diffusers' folder, or Stable Diffusion's single file.

    python -m ldm.export runs/NAME my-weights --fp16
    python -m ldm.export sd-v1.safetensors my-folder --ema no
    python -m ldm.export my-folder my-model.safetensors --format single-file

Any model that txt2img.py --ckpt takes can be exported: a run (its newest model), a folder, a single file. A folder gets
a model card, README.md, written from the run's configuration, measures and samples.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli.parser import OneLineParser
from ldm.cli.run import run_command
from ldm.inference.options import FORMATS

if TYPE_CHECKING:
    from ldm.model.components import ModelComponents

STORED = ("fp32", "fp16", "bf16")


def main(args: argparse.Namespace) -> None:
    from ldm.inference.pipeline import STORED as DTYPES
    from ldm.interop.compvis.writing import check_target_file, write_single_file
    from ldm.interop.diffusers_layout.folder import check_target, write_folder
    from ldm.interop.model_card import files_beside

    (check_target if args.format == "diffusers" else check_target_file)(args.target)
    ema = ema_wanted(args.ema)
    if args.fp16 and args.dtype not in ("fp16", None):
        raise ValueError(f"--fp16 and --dtype {args.dtype} ask for two precisions: give one of them")
    parts = read_source(args.source, ema)
    print(parts.describe(), flush=True)
    dtype = DTYPES["fp16" if args.fp16 else args.dtype or "fp32"]
    if args.format == "diffusers":
        length = None if isinstance(ema, bool) else ema
        beside = files_beside(parts, args.source, name=args.target.resolve().name, length=length)
        write_folder(parts, args.target, dtype=dtype, beside=beside)
    else:
        write_single_file(parts, args.target, dtype=dtype)
    print(f"wrote {args.target}")


def ema_wanted(text: str) -> bool | float:
    """Parse yes, no, or the relative length of an average. Raises ValueError for anything else."""
    try:
        return {"yes": True, "no": False}[text] if text in ("yes", "no") else float(text)
    except ValueError:
        raise ValueError(f"--ema is {text!r}, expected yes, no, or an average's relative length, as 0.1") from None


def read_source(source: Path, ema: bool | float) -> ModelComponents:
    """Read the model in float32. ema: whether to use the averaged weights of a file that holds both; or the length of
    an average to reconstruct from a run's snapshots. Raises ValueError or FileNotFoundError if they do not exist."""
    import torch

    from ldm.interop.read_model import read_model
    from ldm.training.optim.post_hoc_ema import Snapshot, mixture
    from ldm.training.optim.snapshot_files import mixed_components, read_snapshots

    if isinstance(ema, bool):
        return read_model(source, dtype=torch.float32, ema=ema)
    known = read_snapshots(source)
    if not known:
        raise ValueError(f"{source} has no snapshots, from which to reconstruct --ema {ema}: give yes or no")
    made = mixture(list(known), Snapshot(max(snapshot.step for snapshot in known), ema))
    return mixed_components(source, list(known.values()), made.shares)


def arguments() -> argparse.ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    parser.prog = "python -m ldm.export"
    add = parser.add_argument
    add("source", type=Path, help="a run, as runs/NAME; a model's folder; or a single file")
    add("target", type=Path, help="what to write; an older export there is replaced")
    add("--format", choices=FORMATS, default="diffusers", help="a folder (default), or one file and its .yaml")
    add("--dtype", choices=STORED, help="of the weights (default: fp32)")
    add("--fp16", action="store_true", help="half the size; the same as --dtype fp16")
    add("--ema", default="yes", metavar="WHICH",
        help="of a single file that holds both the averaged weights (yes, the default) or the others (no); of a run "
        "with snapshots the average of this relative length, as 0.1")  # fmt: skip
    add("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, arguments()))
