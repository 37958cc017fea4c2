"""Read what a run of training has reached: the averaged weights of its newest valid checkpoint.

Whoever reads a run, however it ended, reads these and not the last export in it. Nothing is written: the run may be
training meanwhile.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.files.checkpoints import MANIFEST, STATE, Checkpoints, fault, step_of
from ldm.files.digest import short_hash
from ldm.files.messages import one_line
from ldm.files.strict_json import json_lines, read_json
from ldm.interop.fragments import Fragments
from ldm.interop.network_files import RUN_MODEL
from ldm.interop.weight_reader import Weights

CHECKPOINTS, METRICS = "checkpoints", "metrics.jsonl"  # in a run's folder
EXPORTS = (RUN_MODEL, "vae", "text_encoder")  # folders in a run that hold exports of what it trains
AVERAGE, BUFFERS = "ema/", "buffers/"  # prefixes of a checkpoint's tensors
SECTIONS = {"vae": "vae", "text": "clip"}  # what version 0.1, which recorded no kind, trained: otherwise a denoiser

Tensors = Mapping[str, Tensor]
Report = Callable[[str], object]  # gets words about what was read


@dataclass(frozen=True)
class TrainedWeights:
    """The averaged weights of a checkpoint, in memory, and what its run recorded with them."""

    run: Path
    checkpoint: Path
    digest: str  # of the checkpoint: 10 hex digits
    config: str  # the run's resolved configuration, as YAML
    samples_seen: int
    measured: Mapping[str, Any]  # what the training measured of these weights
    tensors: Tensors  # parameters as vectors, float32; buffers in their shape

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The configuration as plain values."""
        from ldm.config import read_tree  # loads pydantic, which reading anything but a run does not need

        return read_tree(self.config)

    @property
    def kind(self) -> str:
        """The kind of training: "denoiser", "vae", "clip" or another."""
        by_section = next((kind for section, kind in SECTIONS.items() if section in self.tree), "denoiser")
        return str(self.tree.get("kind", by_section))

    @property
    def step(self) -> int:
        return step_of(self.checkpoint)

    def describe(self) -> str:
        """Return "averaged weights of step 40 of 400"."""
        return f"averaged weights of step {self.step} of {self.tree.get('run', {}).get('steps', '?')}"

    def weights_of(
        self,
        network: nn.Module,
        rename: Callable[[Tensors], Tensors] = dict,
        remedy: str = "its configuration is of another network, give another run",
    ) -> Weights:
        """Return the weights in the shapes of a network, which may be of meta tensors.

        rename: to the network's names. Raises ValueError, with the remedy, if a tensor is missing or of another size.
        """
        flat, shaped = rename(self.tensors), dict[str, Tensor]()
        for name, wanted in network.state_dict().items():
            found = flat.get(name)
            if found is None or found.numel() != wanted.numel():
                raise ValueError(
                    f"{self.checkpoint} holds {'no' if found is None else found.numel()} elements of {name}, expected "
                    f"{wanted.numel()}: {remedy}"
                )
            shaped[name] = found.view(wanted.shape)
        files = tuple(sorted(self.checkpoint.glob("rank_*.safetensors")))
        return Weights(files, shaped, lambda: shaped, {})


def run_folder(path: Path) -> Path | None:
    """Return the run that a path names: its folder, or an export in it. None if there are no checkpoints."""
    place = path if path.name else path.resolve()
    for folder in (path, *([place.parent] if place.name in EXPORTS else [])):
        if Checkpoints(folder / CHECKPOINTS, keep=1).all():
            return folder
    return None


def trained_weights(path: Path) -> TrainedWeights | None:
    """Read the newest valid checkpoint of the run that a path names, and warn of newer ones that are damaged.

    None if the path is no run with checkpoints or, with a warning, if none of them is valid.
    """
    run = run_folder(path)
    if run is None:
        return None
    checkpoints = Checkpoints(run / CHECKPOINTS, keep=1)
    damaged, paths = list[str](), checkpoints.all()
    while paths:
        checkpoint = paths.pop()
        found = _read(run, checkpoint)
        if isinstance(found, TrainedWeights):
            for reason in damaged:
                warnings.warn(f"{reason}: {checkpoint.name} is read instead", stacklevel=2)
            return found
        if checkpoint.exists():
            damaged.append(f"checkpoint {checkpoint} is damaged ({found})")
        else:  # the run is training, and has removed it as too old
            damaged, paths = [], checkpoints.all()
    for reason in damaged:
        warnings.warn(f"{reason}: the last export in {run} is read instead, if there is one", stacklevel=2)
    return None


def _read(run: Path, checkpoint: Path) -> TrainedWeights | str:
    """Read a checkpoint; returns the reason if it is damaged."""
    if (reason := fault(checkpoint)) is not None:
        return reason
    try:
        state = read_json(checkpoint / STATE)
        with Fragments(checkpoint) as fragments:
            sizes = fragments.sizes(AVERAGE.rstrip("/"))
            tensors = {name: fragments.read(AVERAGE + name, 0, size) for name, size in sizes.items()}
            buffers = [key for key in fragments.keys() if key.startswith(BUFFERS)]
            tensors |= {key.removeprefix(BUFFERS): fragments.whole(key).clone() for key in buffers}
        return TrainedWeights(
            run=run,
            checkpoint=checkpoint,
            digest=short_hash([checkpoint / MANIFEST]),
            config=str(state["config"]),
            samples_seen=int(state.get("samples_seen", 0)),
            measured=dict(state.get("measured", {})),
            tensors=tensors,
        )
    except Exception as error:  # safetensors' own errors derive from Exception only
        return one_line(error, 200)


def no_report(words: str) -> None:
    """Report nothing."""


def refuse_unfinished(path: Path, export: Path) -> None:
    """Raise ValueError if a path is a run that has neither a valid checkpoint nor this export."""
    if not export.is_dir() and (path / METRICS).is_file():
        raise ValueError(
            f"{path} is a run without a valid checkpoint, and without {export.name}/: start its training again, and "
            "stop it after a step at the earliest"
        )


def same_weights(ours: Tensors, theirs: Tensors) -> bool:
    """Return whether both have the same tensors, bit for bit."""
    same_names = ours.keys() == theirs.keys()
    return same_names and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def exported_step(run: Path) -> int | None:
    """Return the step of a run's last export, by its metrics: a recorded evaluation was exported before."""
    metrics = run / METRICS
    records = json_lines(metrics.read_text(errors="replace")) if metrics.is_file() else []
    steps = [record["step"] for record in records if "loss" not in record and isinstance(record.get("step"), int)]
    return max(steps, default=None)
