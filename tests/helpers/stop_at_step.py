"""Run a training command that sends itself a signal after a step: `python stop_at_step.py SIGNAL STEP SCRIPT WORDS`."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).parents[2]


def main(name: str, step: str, script: str, *words: str) -> None:
    from ldm.training.engine.engine import Engine, Update

    update = Engine.update

    def updating(self: Engine, losses: Iterable[Tensor], wishes: Sequence[bool] = ()) -> Update:
        found = update(self, losses, wishes)
        if self.step == int(step):
            os.kill(os.getpid(), signal.Signals[name])
        return found

    Engine.update = updating
    sys.argv = [script, *words]
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
