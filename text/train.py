"""Train a small CLIP contrastively on captioned shards: the text encoder of a latent diffusion model.

    python text/train.py --config configs/emoji64_clip.yaml [section.key=value ...]

deepspeed and torchrun start it on several devices. ldm/train.py reads the averaged weights of the newest checkpoint,
also of a run that was stopped: model.text=runs/NAME. At the end the averaged text tower is written to RUN/text_encoder
and its tokenizer to RUN/tokenizer, as transformers reads them, and the complete CLIP to RUN/clip, as open_clip does.

The algorithm is ldm/training/clip_task.py, the loop around it ldm/training/loop.py.
"""

from __future__ import annotations

import sys
from argparse import Namespace

from ldm.cli import run_command, training_arguments


def main(args: Namespace) -> None:
    from ldm.training.task import run_task

    run_task(args, default="clip")


if __name__ == "__main__":
    sys.exit(run_command(main, training_arguments(__doc__ or "")))
