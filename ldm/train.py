"""Train a text-to-image denoiser on captioned shards.

    python ldm/train.py --config configs/emoji64_dit.yaml [section.key=value ...]

deepspeed and torchrun start it on several devices. txt2img.py draws with the averaged weights of the newest checkpoint,
also of a run that was stopped: `python txt2img.py --ckpt runs/NAME --prompt "..."`. Every run.sample_every steps they
are exported to RUN/model, for other programs.

The algorithm is ldm/training/denoiser_task.py, the loop around it ldm/training/loop.py.
"""

from __future__ import annotations

import sys
from argparse import Namespace

from ldm.cli import run_command, training_arguments


def main(args: Namespace) -> None:
    from ldm.training.task import run_task

    run_task(args, default="denoiser")


if __name__ == "__main__":
    sys.exit(run_command(main, training_arguments(__doc__ or "")))
