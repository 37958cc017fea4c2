"""Every call of the file system that saving a checkpoint makes, each of which can be made to fail, or be the last.

Used by tests/ldm/checkpoints and by benchmarks/reliability_checkpoints.py.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn
from unittest.mock import patch

import safetensors.torch
import torch
from torch import Tensor

from ldm.files.checkpoints import Checkpoints, fault
from ldm.interop.fragments import Fragments, Span
from ldm.training.checkpoints.saver import Saver, Status


class Point(NamedTuple):
    """A call: which, of which file or folder, and the how manieth of its kind."""

    call: str
    target: str
    number: int

    def __str__(self) -> str:
        return f"{self.call} {self.target}" + f" ({self.number})" * (self.number > 1)


TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{32}\.partial")  # the name that ldm.files.atomic writes a file under
RANKS, KEEP, NEW = 2, 2, 3  # step NEW is saved beside two older ones, the first of which is then removed
# full: the disk is, as soon as the call is made; half: when half of it is done. death: of the process.
How = Literal["full", "half", "death before", "death half-way", "death after"]
HOWS: tuple[How, ...] = ("full", "half", "death before", "death half-way", "death after")
RANK_1_FAILS = Point("save_file", "rank_00001.safetensors", 1)
PATH_CALLS = ("open", "read_text", "read_bytes", "write_text", "rename", "replace", "unlink", "mkdir")
HALVES = ("write_text", "save_file", "rmtree")
CALLS: tuple[tuple[Any, str], ...] = (
    *((Path, name) for name in PATH_CALLS),
    *((os, name) for name in ("open", "fsync")),
    (shutil, "rmtree"),
    (safetensors.torch, "save_file"),
)


class Death(BaseException):
    """The process that made a call is no more; nothing catches it."""


class Calls:
    """While it is entered, the calls under a folder are listed, and some of them go wrong."""

    def __init__(self, folder: Path, faults: Mapping[Point, How] | None = None) -> None:
        self.folder, self.faults = folder, dict(faults or {})
        self.points: list[Point] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._dead: set[int] = set()  # threads
        self._local, self._lock, self._stack = threading.local(), threading.Lock(), ExitStack()

    def __enter__(self) -> Calls:
        for owner, name in CALLS:
            self._stack.enter_context(patch.object(owner, name, self._watched(getattr(owner, name), name)))
        self._stack.enter_context(patch("threading.excepthook", lambda args: None))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _watched(self, real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            target = self._target(name, arguments)
            if target is None or getattr(self._local, "inside", False):
                return real(*arguments, **named)
            self._local.inside = True
            try:
                return self._call(name, target, real, arguments, named)
            finally:
                self._local.inside = False

        return call

    def _target(self, name: str, arguments: Sequence[Any]) -> Path | None:
        """The file or folder that a call is about, if it is one of ours."""
        place = arguments[1] if name == "save_file" else arguments[0]
        if name == "fsync":
            place = os.readlink(f"/proc/self/fd/{place}")
        path = Path(place) if isinstance(place, (str, Path)) else None
        return path if path is not None and path.is_relative_to(self.folder) else None

    def _call(self, name: str, target: Path, real: Callable[..., Any], arguments: Any, named: Any) -> Any:
        if threading.get_ident() in self._dead:
            raise Death
        with self._lock:
            shown = TEMPORARY.sub(r"\1.partial", target.name)
            self._counts[name, shown] += 1
            point = Point(name, shown, self._counts[name, shown])
            self.points.append(point)
        if name == "fsync":  # what the system's cache loses is another matter, and waiting for the disk takes long
            real = _nothing
        how = self.faults.get(point)
        if how is None:
            return real(*arguments, **named)
        if how in ("half", "death half-way"):
            _half(name, target, real, arguments)
        if how == "death after":
            real(*arguments, **named)
        if how in ("full", "half"):
            if named.get("ignore_errors"):
                return None
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        self.die()

    def die(self) -> NoReturn:
        self._dead.add(threading.get_ident())
        raise Death


def _nothing(*_: Any) -> None:
    pass


def _half(name: str, target: Path, real: Callable[..., Any], arguments: Any) -> None:
    """What a call has done that was cut off."""
    if name != "rmtree":
        real(*arguments)
        content = target.read_bytes()
        target.write_bytes(content[: len(content) // 2])
    elif target.is_dir():
        for path in sorted(target.iterdir())[::2]:
            path.unlink()


def state(step: int, rank: int) -> tuple[dict[str, Tensor], dict[str, Span]]:
    """A rank's part of a run: half of a matrix's elements, of its moments, and its own generator."""
    drawn = torch.Generator().manual_seed(step)
    tensors: dict[str, Tensor] = {}
    spans: dict[str, Span] = {}
    for group in ("weights", "exp_avg", "ema"):
        whole = torch.randn(600, generator=drawn)
        spans[f"{group}/matrix"] = Span("matrix", 300 * rank, 300 * (rank + 1))
        tensors[f"{group}/matrix"] = whole[300 * rank : 300 * (rank + 1)]
    tensors[f"generators/{rank}/cpu"] = torch.arange(100 * rank, 100 * rank + 99, dtype=torch.uint8)
    return tensors, spans


def make_savers(folder: Path, *, keep: int = KEEP) -> list[Saver]:
    return [Saver(Checkpoints(folder, keep=keep), rank=rank, ranks=RANKS) for rank in range(RANKS)]


def save(savers: Sequence[Saver], step: int) -> bool:
    """One save by all ranks, as the training loop does it. Returns whether it is told to have been written."""
    try:
        savers[0].prepare(step, 0)
    except OSError:
        return False
    for saver in reversed(savers):
        saver.begin(step, *state(step, saver.rank), {"step": step})
    failed = wait(savers)
    for saver in savers:
        saver.end(abandon=failed)
    return not failed


def wait(savers: Sequence[Saver]) -> bool:
    """Until all ranks have written, or one has failed: whether one has. Raises Death if one has died."""
    threads = [saver._thread for saver in savers]
    while True:
        over = [thread is not None and not thread.is_alive() for thread in threads]  # before the statuses are looked at
        statuses = [saver.status for saver in savers]
        if any(ended and status is Status.WRITING for ended, status in zip(over, statuses, strict=True)):
            for saver, thread in zip(savers, threads, strict=True):
                saver._abandoned.set()  # it would wait for the dead one until it is killed itself
                assert thread is not None
                thread.join()
            raise Death
        if Status.FAILED in statuses:
            return True
        if all(status is Status.WRITTEN for status in statuses):
            return False
        time.sleep(0.001)


@contextmanager
def in_haste() -> Iterator[None]:
    """Without waiting for the disk, and looking for other ranks' files all the time."""
    with patch("os.fsync", _nothing), patch("ldm.training.checkpoints.saver.POLL_SECONDS", 0.001):
        yield


def prepare_folder(folder: Path) -> None:
    savers = make_savers(folder)
    with in_haste():
        for step in range(1, NEW):
            assert save(savers, step)


def points_of_a_save(folder: Path) -> list[Point]:
    """Those of a save that goes well, in a copy of the prepared folder."""
    with copy_of(folder) as scratch, in_haste(), Calls(scratch) as calls:
        assert save(make_savers(scratch), NEW)
    return sorted(calls.points)


def points_of_giving_up(folder: Path) -> list[Point]:
    """Those that a save makes only after rank 1 could not write: nothing of it is to stay."""
    with copy_of(folder) as scratch, in_haste(), Calls(scratch, {RANK_1_FAILS: "half"}) as calls:
        assert not save(make_savers(scratch), NEW)
    return sorted(set(calls.points) - set(points_of_a_save(folder)))


def ways(point: Point) -> tuple[How, ...]:
    """How it can go wrong: only what writes or removes much can do half of it."""
    return HOWS if point.call in HALVES else tuple(how for how in HOWS if "half" not in how)


@contextmanager
def copy_of(folder: Path) -> Iterator[Path]:
    """A copy of the same name, removed when it has been used."""
    scratch = folder.parent / "scratch"
    try:
        yield shutil.copytree(folder, scratch / folder.name)
    finally:
        shutil.rmtree(scratch)


def broken_promise(folder: Path, faults: Mapping[Point, How]) -> str | None:
    """What does not hold after a save to a copy of the prepared folder went wrong. None: all does."""
    with copy_of(folder) as scratch:
        savers, told = make_savers(scratch), False
        with in_haste(), Calls(scratch, faults) as calls, suppress(Death):
            told = save(savers, NEW)
        if not faults.keys() <= set(calls.points):
            return "the call was not made"
        died = any(how.startswith("death") for how in faults.values())
        return _after(scratch, told) or _later(scratch, make_savers(scratch) if died else savers, clear=died)


def _after(folder: Path, told: bool) -> str | None:
    """What is wrong at once: the older checkpoint must be as it was, the new one whole or not under its name."""
    checkpoints = Checkpoints(folder, keep=KEEP)
    older, new = checkpoints.path(NEW - 1), checkpoints.path(NEW)
    if (wrong := fault(older)) is not None:
        return f"{older.name}: {wrong}"
    if told and not new.exists():
        return f"{new.name} was told to be written"
    for path in checkpoints.all():
        if (wrong := fault(path)) is not None:
            return f"{path.name}: {wrong}"
        if not holds(path):
            return f"{path.name} holds something else"
    return None


def _later(folder: Path, savers: list[Saver], *, clear: bool) -> str | None:
    """What is wrong after the next save, of the same step if it is not there: only good ones are to be left."""
    checkpoints = Checkpoints(folder, keep=KEEP)
    if clear:
        checkpoints.clear()
    step = NEW + checkpoints.path(NEW).exists()
    with in_haste():
        if not save(savers, step):
            return f"then step {step} could not be saved ({savers[0].error or savers[1].error})"
    left = {path.name for path in folder.iterdir()}
    kept = {checkpoints.path(step - 1).name, checkpoints.path(step).name, "latest"}
    if left != kept or (folder / "latest").read_text().strip() != checkpoints.path(step).name:
        return f"then there are {sorted(left)}"
    return next((wrong for path in checkpoints.all() if (wrong := fault(path)) is not None), None)


def holds(path: Path) -> bool:
    """Whether a checkpoint's tensors are those of its step."""
    step = int(path.name.removeprefix("step_"))
    whole = [state(step, rank)[0] for rank in range(RANKS)]
    with Fragments(path) as fragments:
        return all(
            torch.equal(fragments.read(key, 0, 600), torch.cat([tensors[key] for tensors in whole]))
            for key in ("weights/matrix", "exp_avg/matrix", "ema/matrix")
        )
