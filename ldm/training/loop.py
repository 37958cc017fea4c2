"""The training loop of every task: steps, logs, snapshots, checkpoints and samples, and how training ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from data.loader import Batch
from ldm.errors import IN_TRAINING, CheckpointError, NonFiniteError, is_broken_connection
from ldm.training.checkpoints.select import resume
from ldm.training.checkpoints.train_state import RunFacts, Saved, generator_states, restore_generators
from ldm.training.engine.engine import Engine, Update
from ldm.training.faults.watchdog import Watchdog
from ldm.training.optim.averages import Snapshot
from ldm.training.optim.snapshot_files import write_snapshot
from ldm.training.run import CAPTIONS_CUT, DATA_WAIT, SAMPLE, SAVE, SNAPSHOT, WRITTEN, Run, duration
from ldm.training.session import Session
from ldm.training.task import Task

SAVES_FAILED_AT_MOST = 3  # in a row, before a run is stopped


class Training:
    """The training loop and its state between steps."""

    def __init__(self, session: Session[Any], engine: Engine, task: Task[Any], *, samples_seen: int = 0) -> None:
        """samples_seen: before this session, in a resumed run."""
        self.session, self.engine, self.task = session, engine, task
        self.run, self.world, self.images = session.run, session.world, session.images
        self.batch_size = session.config.data.batch_size
        self._since: list[dict[str, Tensor]] = []  # other values returned by losses() since the last progress line
        self._waited = 0.0  # seconds spent waiting for data since then
        self._failed_saves = 0
        self._seen_before = samples_seen - engine.position * self.batch_size  # 0 unless the batch size has changed
        self._said_cut = False
        self._saved_step = engine.step if engine.resumed else -1  # last step saved, or being saved

    def go(self) -> None:
        """Take optimiser steps until run.steps, the time limit or a signal ends training."""
        engine, run = self.engine, self.run
        last = engine.step == run.config.steps
        # Sample at the start, and if the run was interrupted between a checkpoint and its sample.
        if engine.step % run.config.sample_every == 0 or last:
            if self.world.any_rank(run.is_main and not run.has_sample(engine.step)):
                self._sample()
        batches = self.images.stream(position=engine.position)
        run.restart_clock()
        while not last:
            self.session.watch.moved(engine.step + 1)
            started = time.monotonic()
            with self.session.watch.elsewhere():  # data loading has timeouts of its own
                batch = next(batches)
            self._waited += time.monotonic() - started
            lr, before = engine.lr, len(self._since)
            update = engine.update(self._parts(batch), wishes=[self.session.stop.requested, run.out_of_time])
            self._log_save(update.saved)
            if update.fault is None:
                self._log(update.loss, lr)
            else:
                del self._since[before:]
                self._log_skip(update, batch)
            last = engine.step == run.config.steps or any(update.wished)
            if update.fault is None or last:
                self._after_step(last, draw=not update.wished[0])
        batches.close()
        self._finish_save()

    def _parts(self, batch: Batch) -> Iterator[Tensor]:
        """Yield the loss of each part of a batch (gradient accumulation), computed on demand."""
        for part in batch.split(self.engine.config.accumulation):
            found = self.task.losses(self.engine, part, self.engine.step)
            self._since.append({name: value.detach() for name, value in found.items() if name != "loss"})
            yield found["loss"]

    def _log(self, loss: float, lr: float) -> None:
        step = self.engine.step
        measures = self._measures() if self.run.should_log(step) else {}  # a log line costs two all-reduces
        self.run.log_step(
            step=step,
            loss=loss,
            lr=lr,
            batch_size=self.batch_size,
            samples_seen=self._samples_seen,
            measures=measures,
        )

    @property
    def _samples_seen(self) -> int:
        return self._seen_before + self.engine.position * self.batch_size

    def _measures(self) -> dict[str, float]:
        """Average over all ranks since the last progress line: the values of all parts and the fraction of time spent
        waiting for data. Includes the number of bad samples if there are any."""
        names = self._since[0] if self._since else {}
        together = {name: torch.cat([parts[name].flatten() for parts in self._since]) for name in names}
        fraction = self._waited / max(self.run.seconds_since_logged, 1e-9)
        self._since, self._waited = [], 0.0
        cut = self.images.cut_captions
        measured = [0, 0] if cut is None else [cut.measured, cut.cut]
        bad, waited, measured, cut_off = self.world.all_reduce([len(self.images.bad_samples), fraction, *measured])
        shares = {DATA_WAIT: waited / self.world.ranks}
        if cut is not None and cut_off:
            shares[CAPTIONS_CUT] = cut_off / measured
            if not self._said_cut:
                self.run.log(
                    f"{cut_off:,.0f} of the first {measured:,.0f} captions are longer than the text encoder's "
                    f"{cut.tokens} tokens: their ends are not used"
                )
            self._said_cut = True
        return self.world.mean(together) | shares | ({"bad_samples": round(bad)} if bad else {})

    def _log_skip(self, update: Update, batch: Batch) -> None:
        """Log which batch was skipped and why. Each rank that caused it, or may have, records its samples."""
        step, position = self.engine.step + 1, self.engine.position - 1
        blamed = f" on rank {', '.join(map(str, update.bad_ranks))}" if update.bad_ranks else ""
        if not update.bad_ranks or self.world.rank in update.bad_ranks:
            path = self.run.skipped(self.world.rank, step=step, position=position, fault=update.fault, keys=batch.keys)
            blamed += f"; its samples are in {path}"
        self.run.log(f"step {step}: {update.fault}{blamed}: batch {position} is skipped, the weights are unchanged")

    def _after_step(self, last: bool, *, draw: bool) -> None:
        """Write the snapshots, checkpoint and (if draw) sample that are due. Their time is left out of images/s."""
        step, config = self.engine.step, self.run.config
        if step % config.snapshot_every == 0 or last:  # before the checkpoint, which relies on them
            snapshots(self.engine, self.run)
        if step % config.checkpoint_every == 0 or last:
            self._save()
        if draw and (step % config.sample_every == 0 or last):
            self._sample()

    def _save(self) -> None:
        if self.engine.step == self._saved_step:  # already saved: stopped at a skipped step, or before the first
            return
        with self.session.watch.elsewhere(), self.run.between_steps(SAVE):
            self._log_save(self.engine.finish_save())  # the previous checkpoint, if it is still being written
            self._saved_step = self.engine.step
            with untouched_generators():
                measured = self.task.measured(self._averaged_network, self.engine.position)
            facts = RunFacts(
                config=self.run.config_text,
                data=self.images.fingerprint,
                samples_seen=self._samples_seen,
                state=self.task.state_dict(),
                measured=measured,
                rewound_to=self.run.rewound_to,
            )
            self._log_save(self.engine.save(facts))

    def _averaged_network(self) -> nn.Module:
        return self.task.averaged_network(self.engine.averaged_weights(everywhere=True))

    def _finish_save(self) -> None:
        """Wait for the last checkpoint. Raises CheckpointError if it could not be written."""
        with self.session.watch.elsewhere():
            self._log_save(self.engine.finish_save())
        if self._failed_saves:
            raise CheckpointError("the last checkpoint could not be written: free disk space, and start again")

    def _log_save(self, saved: Saved | None) -> None:
        """Log a failed checkpoint. Raises CheckpointError after SAVES_FAILED_AT_MOST failures in a row."""
        if saved is None:
            return
        if not saved.failed:
            self._failed_saves = 0
            return
        self._failed_saves += 1
        self._saved_step = -1
        before = self.run.checkpoints.all()
        intact = f"{before[-1].name} is intact" if before else "there is no earlier one"
        reason = f"rank {self.world.rank}: {saved.reason}" if saved.reason else "another rank logs the reason"
        self.run.log(f"checkpoint {saved.path.name} could not be written ({reason}); {intact}")
        if not self.world.is_main and saved.reason:
            print(f"checkpoint {saved.path.name} could not be written ({reason})", flush=True)
        if self._failed_saves >= SAVES_FAILED_AT_MOST:
            raise CheckpointError(
                f"{self._failed_saves} checkpoints in a row could not be written to {saved.path.parent}, the last one "
                f"because: {saved.reason or 'see above'}"
            )

    def _sample(self) -> None:
        """Evaluate, show and export the averaged weights. A stop signal abandons this."""
        step, before = self.engine.step, self.run.left.of_work(SAMPLE)
        if before is None or step == self.run.config.steps:  # the first and the last, which nobody expects to take long
            about = "" if before is None else f", about {duration(before)}"
            self.run.log(f"step {step}: evaluating and drawing{about}")
        with self.session.watch.elsewhere(), untouched_generators(), self.run.between_steps(SAMPLE):
            network = self._averaged_network()
            measures = self.task.evaluate(network) if self.session.validation is not None else {}
            abandoned = self.world.any_rank(self.session.stop.requested)
            if self.world.is_main and not abandoned:
                self.session.stop.interruptible(lambda: self._show(step, network, measures))

    def _show(self, step: int, network: nn.Module, measures: Mapping[str, float]) -> None:
        run, task = self.run, self.task
        if measures:
            run.log(f"step {step}: {task.summarize(measures)}")
        shown = run.written(f"the sample of step {step}", lambda: task.show(step, network, run.sample_path(step)))
        exported = run.written(f"the model of step {step}", lambda: task.export(step, network))
        # Last: a run that is killed before will write them when it is resumed, as one that could not.
        run.record(step=step, **measures, **({} if shown and exported else {WRITTEN: False}))


def train(session: Session[Any], task: Task[Any]) -> None:
    """Train from the newest checkpoint until run.steps or run.minutes is reached, or a stop signal arrives.

    Every run.sample_every steps, from step 0 on, all ranks evaluate the averaged weights, and the main rank shows,
    exports and records them. After run.steps, the task finishes.
    """
    run, stop, world = session.run, session.stop, session.world
    engine = session.engine(task)
    for line in (*task.describe(), "docs/training.md explains what the lines below say"):
        run.log(line)
    if session.validation is None:
        run.log("the configuration has no section validation: nothing is measured on held-out pictures")
    state = resume(run, engine, world, config=session.config, images=session.images)
    if state is not None and state.state:
        task.load_state_dict(state.state)
    with stop.deferred(), in_training(engine, session.watch):
        Training(session, engine, task, samples_seen=0 if state is None else state.samples_seen).go()
        if complete := engine.step == run.config.steps:
            with session.watch.elsewhere():
                network = task.averaged_network(engine.averaged_weights(everywhere=True))
                task.complete(network)
                complete = not world.any_rank(stop.requested)
                complete &= not world.is_main or stop.interruptible(lambda: task.finish(network))
        session.watch.done()  # before the watchdog's signals end this process at once
    if not complete:
        by = f" by {stop.name}{' (Ctrl-C)' * (stop.name == 'SIGINT')}" if stop.requested else ""
        run.log(
            f"stopped{by} after step {engine.step} of {run.config.steps}, which is saved: the same command resumes "
            "from there"
        )


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Context manager: restore the random number generators on exit, so that sampling does not affect training."""
    states = generator_states()
    try:
        yield
    finally:
        restore_generators(states)


def snapshots(engine: Engine, run: Run) -> None:
    """Write the current average of each of optim.ema_lengths, for ldm.export."""
    with run.between_steps(SNAPSHOT):
        for length in engine.optim.ema_lengths:
            weights = engine.averaged_weights(length)
            if run.is_main:
                snapshot = Snapshot(engine.step, length)
                write = partial(write_snapshot, weights, run.config.path, snapshot)
                run.written(f"the snapshot of step {engine.step}", write)


@contextmanager
def in_training(engine: Engine, watch: Watchdog) -> Iterator[None]:
    """Context manager: add the rank and step to errors, since other ranks may have met none."""
    try:
        yield
    except Exception as error:
        if engine.world.ranks > 1 and is_broken_connection(error):
            raise watch.lost(error) from error
        if isinstance(error, NonFiniteError | CheckpointError):
            watch.done()  # raised on all ranks: the watchdog must not blame one for leaving
        error.add_note(f"{IN_TRAINING}, rank {engine.world.rank}, step {engine.step + 1}")
        raise
