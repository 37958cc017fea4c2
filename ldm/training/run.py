"""A run's folder and what it tells: the progress line, metrics.jsonl, checkpoints, sample grids."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.files.atomic import atomic_file
from ldm.files.messages import one_line
from ldm.training.checkpoints import Checkpoints
from ldm.training.faults.file_lock import Taken, lock_folder

DATA_WAIT = "data_wait"  # the share of the time in which training waited for data
WAIT_WORTH_TELLING = 0.02
ALLOWABLE = ("optim", "engine")  # sections whose settings run.allow may name


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str  # the run lives in FOLDER/NAME
    folder: str = "runs"
    steps: int
    seed: int = 0
    log_every: int = 50  # steps, like the next two
    sample_every: int = 1000
    checkpoint_every: int = 1000
    snapshot_every: int = 1000  # steps between snapshots of optim.ema_lengths
    minutes: float | None = None  # stop, with a checkpoint, after so long in this session
    keep_checkpoints: int = 2  # the newest that are whole; older ones are removed
    # auto: from the newest whole checkpoint of this run, if it has any; never: an error if it has; else: the path of a
    # checkpoint (one of this run: later ones are set aside), or of the run whose newest one a new run begins with.
    resume: str = "auto"
    allow: tuple[str, ...] = ()  # settings of optim and engine that may differ on resume, as [optim.lr]

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "sample_every", "checkpoint_every", "snapshot_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} must be at least 1, not {getattr(self, name)}")
        if wrong := [key for key in self.allow if key.split(".")[0] not in ALLOWABLE]:
            raise ValueError(f"run.allow names {wrong[0]}, expected settings of {' or '.join(ALLOWABLE)}, as optim.lr")
        if not self.name.strip(".") or "/" in self.name:
            raise ValueError(f"run.name must be one folder's name, not {self.name!r}")

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.name


class Run:
    """What the main rank writes while training; the other ranks make one too and write nothing."""

    def __init__(self, config: RunConfig, *, is_main: bool, config_text: str) -> None:
        self.config, self.is_main = config, is_main
        self.started = time.monotonic()
        self._since = self.started  # time of the last progress line
        self._losses: list[float] = []
        self._locked = False  # whether this process keeps the folder, as far as the file system lets it
        self._steps_timed = 0  # steps since then
        self.rewound_to: str | None = None  # the checkpoint that this run was sent back to by run.resume
        self.checkpoints = Checkpoints(config.path / "checkpoints", keep=config.keep_checkpoints)
        found = self.checkpoints.all()
        if found and config.resume == "never":
            raise ValueError(
                f"{config.path} already holds {found[-1].name}: set run.resume=auto to continue it, or another run.name"
            )
        self.config_text = config_text

    def begin(self, step: int | None) -> None:
        """Make the folder and write the configuration: once data and model are open, so that a mistake in either
        leaves nothing behind. step: of the checkpoint that is gone on from, if any; what a run that was cut off
        recorded or began after it will be written again."""
        if not self.is_main:
            return
        (self.config.path / "samples").mkdir(parents=True, exist_ok=True)
        self.lock()
        (self.config.path / "config.yaml").write_text(self.config_text)
        kept = [] if step is None else [record for record in self._records() if record["step"] <= step]
        with atomic_file(self.metrics_path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        self.checkpoints.clear()

    def lock(self) -> None:
        """Keep the run's folder, if there is one, for this process until it ends. Raises ValueError if another does."""
        if not self.is_main or self._locked or not self.config.path.is_dir():
            return
        try:
            lock_folder(self.config.path)
        except Taken as owner:
            raise ValueError(
                f"{owner} is training in {self.config.path}: wait for it, or give another run.name"
            ) from owner
        except OSError as error:
            self.tell(f"{self.config.path} cannot be locked ({one_line(error)}): start no second training in it")
        self._locked = True

    def has_sample(self, step: int) -> bool:
        """Whether what the network could do at this step has been recorded: by a line without a training loss."""
        return any(record["step"] == step and "loss" not in record for record in self._records())

    def _records(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl; a run that was cut off may have left a part of one."""
        records = []
        for line in self.metrics_path.read_text().splitlines() if self.metrics_path.exists() else ():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
        return records

    @property
    def metrics_path(self) -> Path:
        return self.config.path / "metrics.jsonl"

    def restart_clock(self) -> None:
        """Leave what was done since the last progress line, such as drawing, out of the next one's speed."""
        self._since, self._steps_timed = time.monotonic(), 0

    def sample_path(self, step: int) -> Path:
        return self.config.path / "samples" / f"step_{step:07d}.png"

    @property
    def out_of_time(self) -> bool:
        return self.config.minutes is not None and time.monotonic() - self.started > 60 * self.config.minutes

    def tells_at(self, step: int) -> bool:
        """Whether log_step prints and records a line after this step."""
        return step % self.config.log_every == 0 or step == self.config.steps

    def log_step(
        self, *, step: int, loss: float, lr: float, batch_size: int, samples_seen: int, measures: Mapping[str, float]
    ) -> None:
        """After optimiser step number `step` (counted from 1): print and record every log_every steps.

        The loss shown is the mean since the last line; samples_seen counts what all ranks saw since the start.
        """
        self._losses.append(loss)
        self._steps_timed += 1
        if not self.tells_at(step):
            return
        rate = self._steps_timed * batch_size / max(time.monotonic() - self._since, 1e-9)
        seconds_left = (self.config.steps - step) * batch_size / rate
        mean = sum(self._losses) / len(self._losses)
        self._losses = []
        self.restart_clock()
        shown = "".join(f"  {name} {value:.4g}" for name, value in measures.items() if name != DATA_WAIT)
        waited = measures.get(DATA_WAIT, 0.0)
        shown += f"  waiting for data {waited:.0%}" if waited >= WAIT_WORTH_TELLING else ""
        line = f"step {step}/{self.config.steps}  loss {mean:.4f}{shown}  lr {lr:.2e}  {rate:.1f} images/s"
        self.tell(f"{line}  ETA {duration(seconds_left)}")
        self.record(step=step, loss=mean, lr=lr, samples_seen=samples_seen, images_per_second=rate, **measures)

    @property
    def seconds_since_told(self) -> float:
        return time.monotonic() - self._since

    def skipped(self, rank: int, *, step: int, position: int, fault: str | None, keys: Sequence[str]) -> Path:
        """Write down a batch of which nothing was learned: every rank in a file of its own. Returns its path."""
        path = self.config.path / "skipped" / f"rank_{rank:05d}.jsonl"
        self._append(path, {"step": step, "batch": position, "fault": fault, "samples": list(keys)})
        return path

    @contextlib.contextmanager
    def told_if_not_written(self, what: str) -> Iterator[None]:
        """Within, something is written that training can do without."""
        try:
            yield
        except OSError as error:
            self.tell(f"{what} could not be written ({one_line(error)})")

    def tell(self, line: str) -> None:
        if self.is_main:
            print(line, flush=True)

    def record(self, *, step: int, **measures: Any) -> None:
        """Append one line to metrics.jsonl."""
        if self.is_main:
            self._append(self.metrics_path, {"time": round(time.time(), 1), "step": step} | measures)

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        """A line that cannot be written is told, and lost: training is worth more."""
        try:
            path.parent.mkdir(exist_ok=True)
            with path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            print(f"{path} could not be written ({error.strerror})", flush=True)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 3661 -> "1:01:01"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
