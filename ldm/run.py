"""A run's folder and what it tells: the progress line, metrics.jsonl, checkpoints, sample grids."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ldm.whole import whole_file

CHECKPOINTS_KEPT = 2


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
    resume: Literal["auto", "never"] = "auto"  # auto: from the newest checkpoint of this run, if it has one

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "sample_every", "checkpoint_every", "snapshot_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} must be at least 1, not {getattr(self, name)}")
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
        self._locked: int | None = None  # the folder's descriptor, while this process keeps it
        self._steps_timed = 0  # steps since then
        found = self.newest_checkpoint()
        if found is not None and config.resume == "never":
            raise ValueError(
                f"{config.path} already holds {found.name}: set run.resume=auto to continue it, or another run.name"
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
        with whole_file(self.metrics_path) as partial:
            partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        for leftover in self.config.path.glob("checkpoints/*.partial"):
            shutil.rmtree(leftover)

    def lock(self) -> None:
        """Keep the run's folder, if there is one, for this process until it ends. Raises ValueError if another does."""
        import fcntl

        if not self.is_main or self._locked is not None or not self.config.path.is_dir():
            return
        folder = os.open(self.config.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(folder)
            raise ValueError(
                f"another process is training in {self.config.path}: wait for it, or give another run.name"
            ) from error
        self._locked = folder

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

    def newest_checkpoint(self) -> Path | None:
        return next(reversed(self._whole_checkpoints()), None)

    def _whole_checkpoints(self) -> list[Path]:
        """Oldest first, by their number."""
        found = [path.parent for path in self.config.path.glob("checkpoints/step_*/state.json")]
        whole = [path for path in found if path.suffix != ".partial"]
        return sorted(whole, key=lambda path: int(path.name.removeprefix("step_")))

    def checkpoint_path(self, step: int) -> Path:
        return self.config.path / "checkpoints" / f"step_{step:07d}"

    def sample_path(self, step: int) -> Path:
        return self.config.path / "samples" / f"step_{step:07d}.png"

    def drop_old_checkpoints(self) -> None:
        if self.is_main:
            for path in self._whole_checkpoints()[:-CHECKPOINTS_KEPT]:
                shutil.rmtree(path)

    @property
    def out_of_time(self) -> bool:
        return self.config.minutes is not None and time.monotonic() - self.started > 60 * self.config.minutes

    def tells_at(self, step: int) -> bool:
        """Whether log_step prints and records a line after this step."""
        return step % self.config.log_every == 0 or step == self.config.steps

    def log_step(self, *, step: int, loss: float, lr: float, images: int, measures: Mapping[str, float]) -> None:
        """After optimiser step number `step` (counted from 1): print and record every log_every steps.

        The loss shown is the mean since the last line; `images` counts what all ranks saw since the start.
        """
        self._losses.append(loss)
        self._steps_timed += 1
        if not self.tells_at(step):
            return
        now = time.monotonic()
        # Counted by the steps since the clock started: `images` also holds what earlier sessions of the run saw.
        rate = self._steps_timed * images / step / max(now - self._since, 1e-9)
        seconds_left = (self.config.steps - step) * images / step / rate
        mean = sum(self._losses) / len(self._losses)
        self._losses = []
        self.restart_clock()
        shown = "".join(f"  {name} {value:.4g}" for name, value in measures.items())
        line = f"step {step}/{self.config.steps}  loss {mean:.4f}{shown}  lr {lr:.2e}  {rate:.1f} images/s"
        self.tell(f"{line}  ETA {duration(seconds_left)}")
        self.record(step=step, loss=mean, lr=lr, samples_seen=images, images_per_second=rate, **measures)

    def tell(self, line: str) -> None:
        if self.is_main:
            print(line, flush=True)

    def record(self, *, step: int, **measures: Any) -> None:
        """Append one line to metrics.jsonl."""
        if self.is_main:
            with self.metrics_path.open("a") as file:
                file.write(json.dumps({"time": round(time.time(), 1), "step": step} | measures) + "\n")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 3661 -> "1:01:01"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
