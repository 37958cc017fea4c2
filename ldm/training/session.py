"""The state of a training command before its first step: data are open, nothing is written yet."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

import torch
from torch import Tensor

from data.bad_samples import Quarantine
from data.loader import Batch, CaptionedImages, held_out
from data.readers import Reader
from ldm.errors import DataError
from ldm.model.precision import Precision
from ldm.training.checkpoints.train_state import seed_generators
from ldm.training.engine.config import resolved_precision
from ldm.training.engine.distributed import Ranks
from ldm.training.engine.engine import Engine
from ldm.training.engine.launch import start_process
from ldm.training.faults.signals import StopSignal
from ldm.training.faults.watchdog import Watchdog, meeting_store
from ldm.training.run import Run
from ldm.training.task import Task, TrainingConfig

PROGRESS_SECONDS = 2.0

Config = TypeVar("Config", bound=TrainingConfig)


@dataclass(frozen=True, slots=True)
class Session(Generic[Config]):
    """The environment of a Task: its configuration, its data, and the processes that train together."""

    config: Config
    world: Ranks
    run: Run
    images: CaptionedImages
    validation: CaptionedImages | None  # None: the configuration has no section for it
    stop: StopSignal
    watch: Watchdog

    @property
    def precision(self) -> Precision:
        """The precision of the forward pass."""
        return resolved_precision(self.config.engine.precision, self.world.device)

    def seed(self) -> None:
        """Seed this process's random number generators from run.seed. Call it before building a network."""
        seed_generators(self.config.run.seed)

    def engine(self, task: Task[Config]) -> Engine:
        config = self.config
        return Engine(
            task.network,
            self.world,
            config=config.engine,
            optim=config.optim,
            batch_size=config.data.batch_size,
            total_steps=config.run.steps,
            checkpoints=self.run.checkpoints,
            groups=task.parameter_groups(),
            exported=task.exported,
        )

    def held_out(self) -> Iterator[Batch]:
        """Yield this rank's batches of the validation set, if there is one; fewer if a stop signal arrives."""
        if self.config.validation is None or self.validation is None:
            return
        size = self.config.validation.batch_size
        for batch in self.validation.once(size, part=self.world.rank, parts=self.world.ranks):
            yield batch
            if self.stop.requested:
                return

    def training_sample(self, most: int) -> Iterator[Batch]:
        """Yield this rank's batches of all training images or, if there are more than `most`, of the first `most` in
        the order of training; fewer if a stop signal arrives. Logs how far it is every two seconds."""
        size, total, seen, logged = self.config.data.batch_size, min(most, len(self.images)), 0, time.monotonic()
        if len(self.images) <= most:
            batches = self.images.once(size, part=self.world.rank, parts=self.world.ranks)
        else:
            batches = islice(self.images.stream(), max(1, most // size))
        for batch in batches:
            yield batch
            if self.stop.requested:
                return
            seen += len(batch) * self.world.ranks
            if time.monotonic() - logged > PROGRESS_SECONDS:
                logged = time.monotonic()
                self.run.log(f"{min(seen, total):,} of {total:,} images are measured")

    def collect(self, batches: list[tuple[Batch, Tensor]]) -> Tensor:
        """Gather the measures of all held-out samples, N x ..., in the order of the samples, on every rank.

        batches: this rank's, each with its measures, B x .... Every rank must call it.
        """
        positions = [position for batch, _ in batches for position in batch.positions]
        order = torch.tensor(positions, dtype=torch.int64, device=self.world.device)
        measures = torch.cat([own for _, own in batches]) if batches else None
        try:
            return self.world.gather_in_order(order, measures)
        except ValueError as error:
            raise DataError("none of the held-out samples can be used: give others") from error


def open_session(config: Config, stop: StopSignal, *, reader: Reader) -> Session[Config]:
    """Join the other processes and open the shards."""
    engine = config.engine
    world = start_process(threads=engine.threads)
    watch = Watchdog(world, meeting_store(world), hang_seconds=engine.hang_seconds, compiles=engine.compile, stop=stop)
    run = Run(config.run, is_main=world.is_main)
    seed, rank, ranks = config.run.seed, world.rank, world.ranks
    quarantine = Quarantine(config.run.path / "bad_samples.jsonl", rank=rank)
    remarks = Quarantine(config.run.path / "remarks.jsonl", rank=rank)
    images = CaptionedImages(
        config.data,
        seed=seed,
        reader=reader,
        rank=rank,
        ranks=ranks,
        quarantine=quarantine,
        remarks=remarks,
        main=world.is_main,
    )
    validation = None
    if config.validation is not None:
        size = config.data.image_size
        validation = held_out(
            config.validation, image_size=size, reader=reader, samples=config.data, main=world.is_main
        )
    return Session(config, world, run, images, validation, stop, watch)
