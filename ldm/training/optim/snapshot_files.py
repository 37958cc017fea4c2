"""Snapshots of averages, RUN/ema/step_0001000_0.05.safetensors: which one it is stands in the file itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.interop.diffusers_layout.folder import read_folder
from ldm.interop.network_files import RUN_MODEL, load_strictly, write_weights
from ldm.interop.weight_reader import open_weights
from ldm.model.components import ModelComponents
from ldm.training.optim.post_hoc_ema import Snapshot

FOLDER = "ema"


def write_snapshot(weights: Mapping[str, Tensor], run: Path, snapshot: Snapshot) -> None:
    """One average's weights, in their own precision; the same snapshot of before is replaced."""
    path = run / FOLDER / f"step_{snapshot.step:07d}_{snapshot.length!r}.safetensors"
    path.parent.mkdir(exist_ok=True)
    write_weights(dict(weights), path, {"step": str(snapshot.step), "length": repr(snapshot.length)})


def read_snapshots(run: Path) -> dict[Snapshot, Path]:
    """Those of a run, in order. Raises ValueError, naming the file, for one that is damaged or something else."""
    from safetensors import SafetensorError, safe_open

    found: dict[Snapshot, Path] = {}
    for path in (run / FOLDER).glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata()
            found[Snapshot(int(told["step"]), float(told["length"]))] = path
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no whole snapshot of a run ({error!r}): remove it, or copy it again"
            ) from error
    return dict(sorted(found.items()))


def mixed(paths: Sequence[Path], shares: Sequence[float]) -> dict[str, Tensor]:
    """sum of share_i weights_i, summed in float64, as float32. One file at a time is in memory."""
    total: dict[str, Tensor] = {}
    for path, share in zip(paths, shares, strict=True):
        for name, tensor in open_weights(path).tensors.items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + share * tensor.double()
    return {name: tensor.float() for name, tensor in total.items()}


def mixed_components(run: Path, paths: Sequence[Path], shares: Sequence[float]) -> ModelComponents:
    """The run's newest model with the weights of an average that was never kept, in these shares of those that were."""
    parts = read_folder(run / RUN_MODEL, dtype=torch.float32)
    load_strictly(parts.denoiser, mixed(paths, shares), source=run / FOLDER)
    return parts
