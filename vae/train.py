"""Train a KL autoencoder on captioned shards.

    python vae/train.py --config configs/emoji64_vae.yaml [section.key=value ...]

deepspeed and torchrun start it on several devices. ldm/train.py reads the averaged weights of the newest checkpoint,
also of a run that was stopped: model.vae=runs/NAME. At the end the latents' mean and standard deviation are measured
over up to 4,096 training images, and the weights are written to RUN/vae.

The algorithm is ldm/training/vae_task.py, the loop around it ldm/training/loop.py.
"""

from __future__ import annotations

import sys
from argparse import Namespace

from ldm.cli import run_command, training_arguments


def main(args: Namespace) -> None:
    from ldm.training.task import run_task

    run_task(args, default="vae")


if __name__ == "__main__":
    sys.exit(run_command(main, training_arguments(__doc__ or "")))
