"""A run's folder and its logs: the progress line, metrics.jsonl, checkpoints and sample grids."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.errors import USER_ERROR, exit_code
from ldm.files.atomic import Taken, lock_folder, write_atomically
from ldm.files.checkpoints import Checkpoints
from ldm.files.messages import one_line
from ldm.files.paths import user_path
from ldm.files.strict_json import json_lines
from ldm.files.writing import writing
from ldm.training.time_left import TimeLeft

DATA_WAIT = "data_wait"  # fraction of the time that training spent waiting for data
CAPTIONS_CUT = "captions_cut"  # fraction of the first captions that are longer than the text encoder reads
MIN_LOGGED_WAIT = 0.02
WRITTEN = "written"  # of a record: whether the drawings and the model of its step were
UNSHOWN = (DATA_WAIT, CAPTIONS_CUT)  # measures that are recorded, and are not part of the progress line
SAMPLE, SAVE, SNAPSHOT = "sample", "save", "snapshot"  # the work between the steps
ALLOWABLE = ("optim", "engine", "data")  # sections whose settings run.allow may name, and further settings:
ALLOWABLE_KEYS = ("model.vae", "model.text", "model.objective.prediction")


def is_allowable(key: str) -> bool:
    """Return whether run.allow may name this setting."""
    return key.split(".")[0] in ALLOWABLE or key in ALLOWABLE_KEYS


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str  # the run's folder is FOLDER/NAME
    folder: str = "runs"
    steps: int
    seed: int = 0
    log_every: int = 50  # in steps, like the next two
    sample_every: int = 1000
    checkpoint_every: int = 1000
    snapshot_every: int = 1000  # steps between snapshots of optim.ema_lengths
    minutes: float | None = None  # save a checkpoint and stop after this long in this session
    keep_checkpoints: int = 2  # number of the newest valid checkpoints to keep; older ones are removed
    # auto: resume from the newest valid checkpoint of this run, if any; never: fail if there is one; otherwise the path
    # of a checkpoint (if of this run, later ones are set aside), or of a run from whose newest one a new run starts.
    resume: str = "auto"
    # Settings that may differ from those that the run, or what model.start names, was trained with, as [optim.lr].
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "sample_every", "checkpoint_every", "snapshot_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} must be at least 1, not {getattr(self, name)}")
        if wrong := [key for key in self.allow if not is_allowable(key)]:
            raise ValueError(
                f"run.allow names {wrong[0]}, expected settings of {' or '.join(ALLOWABLE)}, as optim.lr, or "
                f"{' or '.join(ALLOWABLE_KEYS)}"
            )
        if not self.name.strip(".") or "/" in self.name:
            raise ValueError(f"run.name must be the name of a single folder, not {self.name!r}")

    @property
    def path(self) -> Path:
        return user_path(self.folder) / self.name


class Run:
    """The run's folder and logs, written by the main rank. On other ranks, its methods write nothing."""

    def __init__(self, config: RunConfig, *, is_main: bool) -> None:
        self.config, self.is_main = config, is_main
        self.started = time.monotonic()
        self._since = self.started  # time of the last progress line
        self._losses: list[float] = []
        self._locked = False  # whether this process holds the folder, as far as the file system allows
        self._steps_timed = 0  # since the last progress line
        every = {SAMPLE: config.sample_every, SAVE: config.checkpoint_every, SNAPSHOT: config.snapshot_every}
        self.left = TimeLeft(config.steps, every)
        self.rewound_to: str | None = None  # the checkpoint to which run.resume sent this run back
        self.checkpoints = Checkpoints(config.path / "checkpoints", keep=config.keep_checkpoints)
        found = self.checkpoints.all()
        if found and config.resume == "never":
            raise ValueError(
                f"{config.path} already holds {found[-1].name}: set run.resume=auto to continue it, or another run.name"
            )
        self.config_text = ""  # the resolved configuration, known once the run is resumed or begun

    def begin(self, step: int | None) -> None:
        """Create the folder and write the configuration. Call it once data and model are open, so that an error in
        either leaves nothing behind. step: of the checkpoint that is resumed, if any; records of an interrupted run
        after this step are removed, since they will be written again."""
        if not self.is_main:
            return
        path = self.config.path / "config.yaml"
        if step is None and path.exists() and not self.metrics_path.exists():
            raise ValueError(f"{path} is not a run's, and would be overwritten: move it, or give another run.name")
        with writing(self.config.path):
            (self.config.path / "samples").mkdir(parents=True, exist_ok=True)
            self.lock()
            kept = [] if step is None else [record for record in self._records() if record["step"] <= step]
            write_atomically(self.metrics_path, "".join(json.dumps(record) + "\n" for record in kept).encode())
            write_atomically(path, self.config_text.encode())  # after metrics.jsonl, by which a run's is known
        self.checkpoints.clear()

    def lock(self) -> None:
        """Lock the run's folder, if it exists, for this process. Raises ValueError if another process holds it."""
        if not self.is_main or self._locked or not self.config.path.is_dir():
            return
        try:
            lock_folder(self.config.path)
        except Taken as owner:
            raise ValueError(
                f"{owner} is training in {self.config.path}: wait for it, or give another run.name"
            ) from owner
        except OSError as error:
            self.log(f"{self.config.path} cannot be locked ({one_line(error)}): do not start a second training in it")
        self._locked = True

    def has_sample(self, step: int) -> bool:
        """Return whether the sample of this step has been recorded, by a line without a training loss, and written."""
        found = [record for record in self._records() if record["step"] == step and "loss" not in record]
        return any(record.get(WRITTEN, True) for record in found)

    def _records(self) -> list[dict[str, Any]]:
        """Read the complete lines of metrics.jsonl."""
        return json_lines(self.metrics_path.read_text()) if self.metrics_path.exists() else []

    @property
    def metrics_path(self) -> Path:
        return self.config.path / "metrics.jsonl"

    def restart_clock(self) -> None:
        """Leave the time since the last progress line, such as loading, out of the next line's images/s."""
        self._since, self._steps_timed = time.monotonic(), 0

    @contextlib.contextmanager
    def between_steps(self, work: str) -> Iterator[None]:
        """Context manager: count this work (SAMPLE, SAVE or SNAPSHOT) in the time left, and not in images/s."""
        with self.left.working(work):
            yield
        self.restart_clock()

    def sample_path(self, step: int) -> Path:
        return self.config.path / "samples" / f"step_{step:07d}.png"

    @property
    def out_of_time(self) -> bool:
        return self.config.minutes is not None and time.monotonic() - self.started > 60 * self.config.minutes

    def should_log(self, step: int) -> bool:
        """Return whether log_step prints and records a line after this step."""
        return step % self.config.log_every == 0 or step == self.config.steps

    def log_step(
        self, *, step: int, loss: float, lr: float, batch_size: int, samples_seen: int, measures: Mapping[str, float]
    ) -> None:
        """Print and record a progress line every log_every steps. step: the optimiser steps taken so far.

        The loss shown is the mean since the last line; samples_seen counts the samples of all ranks since the start.
        """
        self._losses.append(loss)
        self._steps_timed += 1
        if not self.should_log(step):
            return
        seconds = max(time.monotonic() - self._since, 1e-9)
        rate = self._steps_timed * batch_size / seconds
        self.left.add_steps(self._steps_timed, seconds)
        mean = sum(self._losses) / len(self._losses)
        self._losses = []
        self.restart_clock()
        shown = "".join(f"  {name} {value:.4g}" for name, value in measures.items() if name not in UNSHOWN)
        waited = measures.get(DATA_WAIT, 0.0)
        shown += f"  waiting for data {waited:.0%}" if waited >= MIN_LOGGED_WAIT else ""
        line = f"step {step}/{self.config.steps}  loss {mean:.4f}{shown}  lr {lr:.2e}  {rate:.1f} images/s"
        self.log(f"{line}  ETA {duration(self.left.seconds(step))}")
        self.record(step=step, loss=mean, lr=lr, samples_seen=samples_seen, images_per_second=rate, **measures)

    @property
    def seconds_since_logged(self) -> float:
        return time.monotonic() - self._since

    def skipped(self, rank: int, *, step: int, position: int, fault: str | None, keys: Sequence[str]) -> Path:
        """Record a skipped batch in this rank's own file. Returns the path of the file."""
        path = self.config.path / "skipped" / f"rank_{rank:05d}.jsonl"
        self._append(path, {"step": step, "batch": position, "fault": fault, "samples": list(keys)})
        return path

    def written(self, what: str, write: Callable[[], object]) -> bool:
        """Write what training can do without, such as drawings. Returns whether it succeeded: an error is logged.

        Errors of the data, of another rank, and of weights that are not finite concern training itself, and pass.
        """
        try:
            write()
        except Exception as error:
            if exit_code(error) not in (None, USER_ERROR):
                raise
            kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
            self.log(f"{what} could not be written ({kind}{one_line(error, 300)}): training goes on without")
            return False
        return True

    def log(self, line: str) -> None:
        if self.is_main:
            print(line, flush=True)

    def record(self, *, step: int, **measures: Any) -> None:
        """Append one line to metrics.jsonl."""
        if self.is_main:
            self._append(self.metrics_path, {"time": round(time.time(), 1), "step": step} | measures)

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        """Append a line. An OSError is logged and the line is lost: it is not worth stopping training."""
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            print(f"{path} could not be written ({error.strerror})", flush=True)


def duration(seconds: float) -> str:
    """Format seconds as hours, minutes and seconds: 3661 -> "1:01:01"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
