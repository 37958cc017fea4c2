"""Read and write a model's noise path, prediction and sampling: scheduler/scheduler_config.json."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, assert_never, cast

from ldm.diffusion.paths import EDMPath, PathConfig, RectifiedFlowPath
from ldm.diffusion.predictions import Prediction
from ldm.diffusion.table_paths import BetaTablePath, CosinePath, LinearBetaPath, ScaledLinearBetaPath, TrainedBetasPath
from ldm.files.strict_json import read_json
from ldm.interop.diffusers_layout.layout import VERSION
from ldm.interop.network_files import as_whole, check_whole_numbers, described_by
from ldm.samplers.stock.scheduler import BETAS, CLASSES, DDPM_BETAS, StockScheduler, is_our_default, stock_scheduler

_NAMES: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
_SCHEDULES: dict[str, type[BetaTablePath]] = {
    "linear": LinearBetaPath,
    "scaled_linear": ScaledLinearBetaPath,
    "squaredcos_cap_v2": CosinePath,
}
# Keys that the paths and diffusers have in common.
_BETAS, _EDM_NUMBERS = ("beta_start", "beta_end"), ("sigma_min", "sigma_max", "sigma_data", "rho")
_COMMON: dict[str, Any] = {
    "_diffusers_version": VERSION,
    "final_sigmas_type": "zero",
    "num_train_timesteps": 1000,
    "solver_order": 2,
}
_DPM_SOLVER: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


MAX_TIMESTEPS = 10_000
DEFAULT_CLASS = str(_DPM_SOLVER["_class_name"])


def scheduler_config_json(
    path: PathConfig, prediction: Prediction, stock: StockScheduler | None = None
) -> dict[str, Any]:
    """Build the config of a scheduler that diffusers' Stable Diffusion and PixArt pipelines both accept.

    stock: keep this class and its values, in place of ours. Raises ValueError for a path and prediction that diffusers
    cannot express.
    """
    known = {"rectified_flow": ("velocity",), "edm": ("edm",)}.get(path.kind, tuple(_NAMES.values()))
    if prediction not in known:
        raise ValueError(
            f"prediction {prediction!r} on path {path.kind!r} cannot be opened by diffusers: use {' or '.join(known)}"
        )
    match path:
        case RectifiedFlowPath():
            flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": path.shift}
            return _COMMON | _DPM_SOLVER | flow
        case EDMPath():
            numbers = {name: getattr(path, name) for name in _EDM_NUMBERS}
            # diffusers calls F "epsilon".
            return _COMMON | {"_class_name": "EDMDPMSolverMultistepScheduler", "prediction_type": "epsilon"} | numbers
        case LinearBetaPath() | ScaledLinearBetaPath() | CosinePath():
            return _table_json(path, prediction, stock)
        case _:
            if isinstance(cast(object, path), TrainedBetasPath):
                return _table_json(path, prediction, stock)
            assert_never(path)


def _table_json(path: BetaTablePath, prediction: Prediction, stock: StockScheduler | None) -> dict[str, Any]:
    """Build the config of a scheduler on a table of betas."""
    table: dict[str, Any] = {
        "num_train_timesteps": path.num_train_timesteps,
        "prediction_type": next(theirs for theirs, ours in _NAMES.items() if ours == prediction),
        "rescale_betas_zero_snr": path.zero_terminal_snr,
    }
    match path:
        case TrainedBetasPath():
            table["trained_betas"] = list(path.table)
        case _:
            table["beta_schedule"] = next(name for name, kind in _SCHEDULES.items() if isinstance(path, kind))
            table |= {name: getattr(path, name) for name in _BETAS if hasattr(path, name)}
    if stock is None:
        return _COMMON | _DPM_SOLVER | table
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in stock.values.items()}
    # Left out where it is the class's default: "-Infinity" is not JSON.
    values = {key: value for key, value in values.items() if value != -math.inf}
    return {"_class_name": stock.kind, "_diffusers_version": VERSION} | values | table


def read_scheduler(file: Path) -> tuple[PathConfig, Prediction]:
    """Read the path and prediction from a scheduler's config. Raises ValueError for those that are not supported."""
    with described_by(file):
        return scheduler_from(read_json(file), source=file)


class Sampling(NamedTuple):
    """How a model's own file says to sample it."""

    stock: StockScheduler | None  # None: by our own default
    unfollowed: str = ""  # what of it is not followed, so that our default is used; "" if nothing


def sampling_from(
    content: Mapping[str, Any],
    path: PathConfig,
    prediction: Prediction,
    *,
    kind: str | None = None,
    unet: bool,
    inpainting: bool,
) -> Sampling:
    """Parse how a scheduler's config says to sample.

    kind: the class that model_index.json names, which counts before the file's own. unet, inpainting: what the network
    is, since diffusers' pipelines for Stable Diffusion replace some values of old files (their __init__).
    """
    if not isinstance(path, BetaTablePath):
        return Sampling(None)
    kind = str(content.get("_class_name", "")) if kind is None else kind
    replaced: dict[str, Any] = {"steps_offset": 1, "clip_sample": False} if unet else {}
    replaced |= {"skip_prk_steps": True} if inpainting else {}
    try:
        if not kind:
            raise ValueError("the scheduler has no class")
        used = {key: value for key, value in replaced.items() if key in CLASSES.get(kind, {})}
        stock = stock_scheduler(kind, dict(content) | used)
        if stock.kind == "PNDMScheduler" and prediction == "x0":
            raise ValueError("PNDMScheduler is not defined for a network that predicts x0")
        if stock.get("timestep_type") == "continuous" and prediction == "v":
            raise ValueError("timestep_type continuous for v is not followed")
    except ValueError as error:
        return Sampling(None, str(error))
    return Sampling(None if is_our_default(stock) else stock)


def warn_of(sampling: Sampling, *, source: Path, path: PathConfig) -> None:
    """Warn of what is not followed."""
    if sampling.unfollowed:
        warnings.warn(
            f"{source}: {sampling.unfollowed}: pictures are drawn with dpmpp_2m on the grid {path.default_grid} unless "
            "--sampler names another",
            stacklevel=2,
        )


def scheduler_from(content: Mapping[str, Any], *, source: Path) -> tuple[PathConfig, Prediction]:
    """Parse a scheduler's config. Raises KeyError with the name of a missing key, or ValueError."""
    check_whole_numbers(content, {"num_train_timesteps": MAX_TIMESTEPS}, source=source)
    kind = str(content.get("prediction_type", "epsilon"))
    name = str(content.get("_class_name", ""))
    if name.startswith("EDM"):
        if kind != "epsilon":
            raise ValueError(f"an EDM scheduler for {kind!r} is not supported, only for 'epsilon'")
        return EDMPath(**{name: content[name] for name in _EDM_NUMBERS if name in content}), "edm"
    if kind == "flow_prediction":
        return RectifiedFlowPath(shift=float(content.get("flow_shift", 1.0))), "velocity"
    if name in CLASSES:  # absent values are the class's
        content = DDPM_BETAS | BETAS.get(name, {}) | dict(content)
    schedule = str(content.get("beta_schedule", "linear"))
    if kind not in _NAMES or (schedule not in _SCHEDULES and content.get("trained_betas") is None):
        raise ValueError(
            f"{source} has prediction_type {kind!r} on beta_schedule {schedule!r}, expected one of "
            f"{sorted(_NAMES)} on one of {sorted(_SCHEDULES)}: this noise path is not supported"
        )
    return cast(PathConfig, _table_path(content, str(schedule), source=source)), _NAMES[kind]


def _table_path(content: Mapping[str, Any], schedule: str, *, source: Path) -> BetaTablePath:
    numbers: dict[str, Any] = {
        "num_train_timesteps": as_whole(content["num_train_timesteps"]),
        "zero_terminal_snr": bool(content.get("rescale_betas_zero_snr")),
    }
    betas = content.get("trained_betas")
    if betas is not None:
        valid = isinstance(betas, list) and len(betas) == numbers["num_train_timesteps"]
        if not valid or not all(type(beta) is float and 0 < beta < 1 for beta in betas):
            raise ValueError(
                f"{source} has trained_betas that are not {numbers['num_train_timesteps']} numbers between 0 and 1, "
                "one per timestep: copy it again"
            )
        return TrainedBetasPath(table=tuple(betas), **numbers)
    if _SCHEDULES[schedule] is not CosinePath:
        numbers |= {name: content[name] for name in _BETAS}
    return _SCHEDULES[schedule](**numbers)
