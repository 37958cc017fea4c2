"""What the autoencoder's, the text encoder's and the denoiser's training share: how it opens, and its loop."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from data.loader import Batch, CaptionedImages, Tokenize, held_out
from ldm.commands import IN_TRAINING
from ldm.config import TextTrainConfig, TrainConfig, VAETrainConfig, check_continues, dump, load_config
from ldm.ema import Snapshot
from ldm.engine import Engine, World, start_process
from ldm.interop.snapshots import write_snapshot
from ldm.run import Run

Config = TypeVar("Config", TrainConfig, VAETrainConfig, TextTrainConfig)


class State(Protocol):
    """What losses remember from step to step, as plain numbers, the same on every rank."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Session(Generic[Config]):
    """A training command between its start and its first step: data are open, nothing is written yet."""

    config: Config
    world: World
    run: Run
    images: CaptionedImages
    validation: CaptionedImages

    def engine(self, network: nn.Module) -> Engine:
        config = self.config
        return Engine(
            network,
            self.world,
            config=config.engine,
            optim=config.optim,
            batch_size=config.data.batch_size,
            total_steps=config.run.steps,
        )


def open_session(
    kind: type[Config], args: Namespace, *, tokenizer: Callable[[Config], Tokenize] | None = None
) -> Session[Config]:
    """Read the configuration, join the other processes, open the shards. tokenizer: made from the configuration."""
    config = load_config(kind, args.config, args.overrides)
    world = start_process()
    run = Run(config.run, is_main=world.is_main, config_text=dump(config))
    tokenize = tokenizer(config) if tokenizer is not None else None
    images = CaptionedImages(config.data, seed=config.run.seed, tokenize=tokenize, rank=world.rank, ranks=world.ranks)
    validation = held_out(config.validation, image_size=config.data.image_size, tokenize=tokenize)
    return Session(config, world, run, images, validation)


def train(
    engine: Engine,
    run: Run,
    images: CaptionedImages,
    losses: Callable[[Batch], dict[str, Tensor]],
    sample: Callable[[int], None],
    state: State | None = None,
) -> None:
    """Take optimiser steps until run.steps or run.minutes is reached, from the newest checkpoint on.

    losses(batch) returns "loss", which is minimised, and other tensors, whose means are logged; sample(step) draws what
    the network can do by now, and records it: every run.sample_every steps, from step 0 on. state: what losses
    remembers, which goes into every checkpoint and comes back from there.
    """
    resume(engine, run, state)
    config, batch_size = run.config, images.config.batch_size
    last = engine.step == config.steps
    with in_training(engine):
        # Sampled at the start, and where a run was cut off between a checkpoint and its sample.
        if engine.step % config.sample_every == 0 or last:
            if engine.agree(run.is_main and not run.has_sample(engine.step)):
                sample(engine.step)
        batches = images.stream(position=engine.step)
        run.restart_clock()
        since: list[dict[str, Tensor]] = []  # what else losses has returned since the last line of progress
        while not last:
            lr, parts = engine.lr, losses(next(batches))
            loss = engine.update(parts.pop("loss"))
            since.append({name: part.detach() for name, part in parts.items()})
            measures = {}
            if run.tells_at(engine.step):  # ranks exchange what a line shows only where there is one
                measures, since = measured(engine, since, images), []
            run.log_step(step=engine.step, loss=loss, lr=lr, images=engine.step * batch_size, measures=measures)
            timed = config.minutes is not None and engine.agree(run.out_of_time)
            last = engine.step == config.steps or timed
            after_step(engine, run, last, sample, batch_size=batch_size, state=state)
        batches.close()
    if engine.step < config.steps:
        run.tell(f"stopped after step {engine.step} of {config.steps}: the same command goes on from there")


def after_step(
    engine: Engine, run: Run, last: bool, sample: Callable[[int], None], *, batch_size: int, state: State | None
) -> None:
    """Snapshots, checkpoint and sample, where they are due; their time counts in no rate."""
    step, config = engine.step, run.config
    if step % config.snapshot_every == 0 or last:  # before the checkpoint, which promises them
        snapshots(engine, run)
    if step % config.checkpoint_every == 0 or last:
        record = {"samples_seen": step * batch_size, "config": run.config_text}
        record |= {"state": state.state_dict()} if state is not None else {}
        engine.save(run.checkpoint_path(step), record)
        run.drop_old_checkpoints()
        run.restart_clock()
    if step % config.sample_every == 0 or last:
        sample(step)
        run.restart_clock()


def measured(engine: Engine, since: Sequence[Mapping[str, Tensor]], images: CaptionedImages) -> dict[str, float]:
    """The means of all parts of some steps over all ranks and, if there are any, the number of bad samples met."""
    bad = engine.total(len(images.bad_samples))
    together = {name: torch.cat([parts[name].flatten() for parts in since]) for name in since[0]}
    return engine.means(together) | ({"bad_samples": bad} if bad else {})


def snapshots(engine: Engine, run: Run) -> None:
    """Keep each of optim.ema_lengths' averages as it is now, for ldm.reconstruct."""
    for length in engine.optim.ema_lengths:
        weights = engine.averaged_weights(length)
        if run.is_main:
            write_snapshot(weights, run.config.path, Snapshot(engine.step, length))
    run.restart_clock()


def resume(engine: Engine, run: Run, state: State | None = None) -> None:
    """Load the newest checkpoint, if there is one that fits, and make the run's folder."""
    run.lock()
    checkpoint = run.newest_checkpoint()
    if checkpoint is not None:
        record = engine.record_of(checkpoint)
        check_continues(then=record["config"], now=run.config_text)
        engine.load(checkpoint)
        if state is not None:
            state.load_state_dict(record["state"])
        run.tell(f"resumed from {checkpoint}")
        if engine.step > run.config.steps:
            raise ValueError(
                f"run.steps is {run.config.steps}, but {checkpoint} has taken {engine.step}: "
                f"set run.steps={engine.step} or more, or another run.name"
            )
    run.begin(None if checkpoint is None else engine.step)


@contextmanager
def in_training(engine: Engine) -> Iterator[None]:
    """Errors within it say which rank met them, and at which step: another rank may have met none."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{IN_TRAINING}, rank {engine.world.rank}, step {engine.step + 1}")
        raise
