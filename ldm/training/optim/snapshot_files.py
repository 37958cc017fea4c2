"""Read and write snapshots of averages, RUN/ema/step_0001000_0.05.safetensors; the metadata identify each one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.interop.network_files import load_strictly, write_weights
from ldm.interop.read_model import read_model
from ldm.interop.weight_reader import open_weights
from ldm.model.components import ModelComponents
from ldm.training.optim.averages import Snapshot

FOLDER = "ema"


def write_snapshot(weights: Mapping[str, Tensor], run: Path, snapshot: Snapshot) -> None:
    """Write one average's weights, in their own dtype; an earlier file of the same snapshot is replaced."""
    path = run / FOLDER / f"step_{snapshot.step:07d}_{snapshot.length!r}.safetensors"
    path.parent.mkdir(exist_ok=True)
    write_weights(dict(weights), path, {"step": str(snapshot.step), "length": repr(snapshot.length)})


def read_snapshots(run: Path) -> dict[Snapshot, Path]:
    """Find a run's snapshots, in order. Raises ValueError, naming the file, for a damaged or foreign one."""
    from safetensors import SafetensorError, safe_open

    found: dict[Snapshot, Path] = {}
    for path in (run / FOLDER).glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            found[Snapshot(int(metadata["step"]), float(metadata["length"]))] = path
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is not a complete snapshot of a run ({error!r}): remove it, or copy it again"
            ) from error
    return dict(sorted(found.items()))


def mixed(paths: Sequence[Path], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Compute the sum of c_i weights_i in float64, as float32. Only one file at a time is in memory."""
    total: dict[str, Tensor] = {}
    for path, coefficient in zip(paths, coefficients, strict=True):
        for name, tensor in open_weights(path).tensors.items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + coefficient * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}


def mixed_components(
    run: Path, wanted: Snapshot, paths: Sequence[Path], coefficients: Sequence[float]
) -> ModelComponents:
    """Load a run's model with the weights of an average, mixed from snapshots with these coefficients."""
    parts = read_model(run, dtype=torch.float32)
    load_strictly(parts.denoiser, mixed(paths, coefficients), source=run / FOLDER)
    assert parts.origin is not None
    remark = f"average of relative length {wanted.length:g} up to step {wanted.step}"
    origin = replace(parts.origin, remarks=(remark,), step=wanted.step, samples_seen=None)
    return replace(parts, origin=origin)
