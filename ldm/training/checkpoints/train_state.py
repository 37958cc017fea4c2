"""Save the complete state of a training run as a checkpoint, and restore it."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldm.errors import CheckpointError
from ldm.files.checkpoints import STATE, Checkpoints
from ldm.files.messages import one_line
from ldm.interop.fragments import Fragments, Span
from ldm.training.checkpoints.saver import POLL_SECONDS, Saver, Status
from ldm.training.engine.zero_partition import Partition
from ldm.training.optim.averages import EMA


class Saved(NamedTuple):
    """The outcome of a save."""

    path: Path
    failed: bool
    reason: str | None  # only on a rank that failed


class RunFacts(NamedTuple):
    """What the loop knows of a run and the engine does not."""

    config: str = ""  # the resolved configuration, as YAML
    data: Mapping[str, Any] = {}  # the fingerprint of the shards
    samples_seen: int = 0
    state: Mapping[str, Any] = {}  # of the task
    measured: Mapping[str, Any] = {}  # of the averaged weights, by the task
    rewound_to: str | None = None  # name of the checkpoint that run.resume sent this run back to


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a checkpoint says of its run besides tensors: state.json."""

    config: str
    data: Mapping[str, Any]
    samples_seen: int = 0
    step: int  # optimiser steps taken
    position: int  # global batches used
    skipped_in_a_row: int = 0
    zero_stage: int = 0
    precision: str
    ranks: int
    versions: Mapping[str, str] = field(default_factory=dict)
    loss_scale: Mapping[str, Any] | None = None  # of fp16
    state: Mapping[str, Any] = field(default_factory=dict)
    rewound_to: str | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        required = {entry.name for entry in fields(self) if _is_required(entry)}
        return {name: value for name, value in asdict(self).items() if name in required or value not in (None, {})}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TrainState:
        """Raises ValueError for a record that lacks something; what a newer version adds is left out."""
        if missing := {entry.name for entry in fields(cls) if _is_required(entry)} - content.keys():
            raise ValueError(f"its {STATE} lacks {', '.join(sorted(missing))}")
        return cls(**{entry.name: content[entry.name] for entry in fields(cls) if entry.name in content})


def _is_required(entry: Field[Any]) -> bool:
    return entry.default is MISSING and entry.default_factory is MISSING


class StateCheckpointer:
    """Collects this rank's part of the training state for checkpoints, and restores it."""

    def __init__(self, partition: Partition, averages: Mapping[str, EMA], checkpoints: Checkpoints | None) -> None:
        self.world, self.partition, self.averages = partition.world, partition, averages
        rank, ranks = self.world.rank, self.world.ranks
        self._saver = None if checkpoints is None else Saver(checkpoints, rank=rank, ranks=ranks)
        self._writing = Path()

    def buffers(self) -> dict[str, Tensor]:
        """Collect the network's persistent buffers, which are not sharded."""
        network = self.partition.network
        saved = network.state_dict().keys()
        return {name: buffer for name, buffer in network.named_buffers() if name in saved}

    def begin(self, state: TrainState) -> Saved | None:
        """Copy the state and start to write it. Returns the failure if the folder cannot be created, else None."""
        assert self._saver is not None, "an engine without a checkpoint folder cannot save"
        assert self._saver.status is Status.IDLE, "finish the previous save first"
        self._writing = self._saver.checkpoints.path(state.step)
        tensors, spans = self._tensors()
        reason = None
        if self.world.is_main:
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            try:
                self._saver.prepare(state.step, size * self.world.ranks)
            except OSError as error:
                reason = one_line(error)
        if self.world.any_rank(reason is not None):
            return Saved(self._writing, True, reason)
        self._saver.begin(state.step, tensors, spans, state.to_json())
        return None

    def report(self) -> list[float]:
        """Return whether this rank has written its part, and whether it failed, as numbers to sum over all ranks."""
        status = self._saver.status if self._saver is not None else Status.IDLE
        return [float(status is Status.WRITTEN), float(status is Status.FAILED)]

    def settle(self, reports: Sequence[float]) -> Saved | None:
        """Complete the current save if the summed reports of all ranks end it, and return the outcome, else None."""
        written, failed = reports
        if self._saver is None or not (failed or written == self.world.ranks):
            return None
        self._saver.end(abandon=failed > 0)
        error = self._saver.error
        # An error after the checkpoint was renamed is not a failure; only the main rank, which renames it, knows.
        lost = failed > 0 and not self.world.any_rank(self.world.is_main and self._writing.exists())
        return Saved(self._writing, lost, None if error is None else one_line(error))

    def finish(self) -> Saved | None:
        """Wait until the current save, if there is one, is complete or has failed."""
        if self._saver is None or not self.world.any_rank(self._saver.status is not Status.IDLE):
            return None
        while True:
            saved = self.settle(self.world.all_reduce(self.report()))
            if saved is not None:
                return saved
            time.sleep(POLL_SECONDS)

    def load(self, folder: Path, *, fresh: bool = False) -> TrainState:
        """Restore the state from a checkpoint; fresh: without the optimiser's moments. Raises CheckpointError."""
        with _readable(folder), Fragments(folder) as fragments:
            state = read_train_state(folder)
            self._check(fragments, folder)

            def read(group: str, span: Span) -> Tensor:
                return fragments.read(f"{group}/{span.name}", span.start, span.stop)

            self.partition.load(read, state.step, fresh=fresh)
            for group, average in self.averages.items():
                spans = {fragment.span.name: fragment.span for fragment in self.partition.owned}
                shadow = {name: read(group, spans[name]) for name in average.shadow}
                average.load_state_dict({"updates": state.step, "shadow": shadow})
            with torch.no_grad():
                for name, buffer in self.buffers().items():
                    buffer.copy_(fragments.whole(f"buffers/{name}"))
            self._restore_generators(fragments, state)
        return state

    @cached_property
    def _owned(self) -> tuple[dict[str, Tensor], dict[str, Span]]:
        """Views of all that this rank owns, and their spans. They stay valid: optimiser and averages work in place."""
        tensors: dict[str, Tensor] = {}
        spans: dict[str, Span] = {}
        for fragment in self.partition.owned:
            name = fragment.span.name
            parts = {"weights": fragment.of(fragment.optimizer_tensor)} | self.partition.moments(fragment)
            parts |= {group: ema.shadow[name] for group, ema in self.averages.items() if name in ema.shadow}
            for group, part in parts.items():
                tensors[f"{group}/{name}"], spans[f"{group}/{name}"] = part, fragment.span
        return tensors, spans

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Span]]:
        """Collect this rank's tensors by their names in its file, and the spans of those that are fragments."""
        owned, spans = self._owned
        tensors = owned | {f"generators/{self.world.rank}/{name}": state for name, state in generator_states().items()}
        if self.world.is_main:
            tensors |= {f"buffers/{name}": buffer for name, buffer in self.buffers().items()}
        return tensors, spans

    def _check(self, fragments: Fragments, folder: Path) -> None:
        held = fragments.sizes("weights")
        wanted = {name: shape.numel() for name, shape in self.partition.shapes.items()}
        for name in sorted(held.keys() | wanted.keys()):
            if held.get(name) != wanted.get(name):
                raise CheckpointError(
                    f"{folder} holds {held.get(name, 'no')} elements of {name}, but this network has "
                    f"{wanted.get(name, 'no')}: it belongs to another network, give another run.name"
                )

    def _restore_generators(self, fragments: Fragments, state: TrainState) -> None:
        """Restore this rank's generators; without stored states, seed them from the position and the rank."""
        own = f"generators/{self.world.rank}/"
        states = {key.removeprefix(own): fragments.whole(key) for key in fragments.keys() if key.startswith(own)}
        if states:
            restore_generators(states)
        else:
            torch.manual_seed(state.position * 1_000_003 + self.world.rank)


def read_train_state(folder: Path) -> TrainState:
    """Read a checkpoint's state.json. Raises CheckpointError if another program wrote it."""
    with _readable(folder):
        return TrainState.from_json(json.loads((folder / STATE).read_text()))


@cache
def versions() -> dict[str, str]:
    """The versions of what computes, as far as they are known: a checkout need not be installed."""
    found: dict[str, str] = {}
    for package in ("latent-foundry", "torch", "deepspeed"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Context manager: turn errors from missing or malformed files into CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # safetensors' own errors derive from Exception only
        raise CheckpointError(f"{folder} cannot be read ({one_line(error, 200)}): take an earlier one") from error


# Training itself draws only from (seed, position); dropout and libraries use these generators.


def seed_generators(seed: int) -> None:
    """Seed all generators: Python's and NumPy's would otherwise start differently in each process."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def generator_states() -> dict[str, Tensor]:
    """Read the states of torch, Python and NumPy, and of torch on this process's GPU, as tensors."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    numpy_state = [str(kind), np.asarray(keys).tolist(), *rest]
    states = {"cpu": torch.get_rng_state(), "python": _bytes(random.getstate()), "numpy": _bytes(numpy_state)}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_generators(states: Mapping[str, Tensor]) -> None:
    """Restore each generator whose state is given."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "python" in states:
        version, numbers, gauss = _value(states["python"])
        random.setstate((version, tuple(numbers), gauss))
    if "numpy" in states:
        kind, keys, *rest = _value(states["numpy"])
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def _bytes(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)


def _value(tensor: Tensor) -> list:
    return json.loads(tensor.numpy().tobytes())
