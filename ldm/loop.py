"""The training loop that the autoencoder, the text encoder and the denoiser share."""

from __future__ import annotations

import json
from collections.abc import Callable

from torch import Tensor

from data.loader import Batch, CaptionedImages
from ldm.config import check_continues
from ldm.engine import Engine
from ldm.run import Run


def train(
    engine: Engine,
    run: Run,
    images: CaptionedImages,
    losses: Callable[[Batch], dict[str, Tensor]],
    sample: Callable[[int], None],
) -> None:
    """Take optimiser steps until run.steps or run.minutes is reached, from the newest checkpoint on.

    losses(batch) returns scalars, of which "loss" is minimised and all are logged; sample(step) draws what the
    network can do by now: every run.sample_every steps, from step 0 on.
    """
    config, batch_size = run.config, images.config.batch_size
    checkpoint = run.newest_checkpoint()
    if checkpoint is not None:
        check_continues(then=json.loads((checkpoint / "state.json").read_text())["config"], now=run.config_text)
        engine.load(checkpoint)
        run.tell(f"resumed from {checkpoint}")
    run.begin()
    if checkpoint is None:
        sample(0)
    batches = images.stream(position=engine.step)
    last = engine.step == config.steps
    run.restart_clock()
    while not last:
        lr, parts = engine.lr, losses(next(batches))
        loss = engine.update(parts.pop("loss"))
        measures = {name: engine.mean(value) for name, value in parts.items()}
        run.log_step(step=engine.step, loss=loss, lr=lr, images=engine.step * batch_size, measures=measures)
        last = engine.step == config.steps or engine.agree(run.out_of_time)
        if engine.step % config.checkpoint_every == 0 or last:
            record = {"samples_seen": engine.step * batch_size, "config": run.config_text}
            engine.save(run.checkpoint_path(engine.step), record)
            run.drop_old_checkpoints()
            run.restart_clock()
        if engine.step % config.sample_every == 0 or last:
            sample(engine.step)
            run.restart_clock()
    batches.close()
