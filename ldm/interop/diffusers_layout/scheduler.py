"""Read and write a model's noise path and prediction: scheduler/scheduler_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never

from ldm.diffusion.paths import EDMPath, PathConfig, RectifiedFlowPath
from ldm.diffusion.predictions import Prediction
from ldm.diffusion.table_paths import BetaTablePath, CosinePath, LinearBetaPath, ScaledLinearBetaPath
from ldm.files.strict_json import read_json
from ldm.interop.diffusers_layout.layout import VERSION
from ldm.interop.network_files import as_whole, check_whole_numbers, described_by

_NAMES = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
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


def scheduler_config_json(path: PathConfig, prediction: Prediction) -> dict[str, Any]:
    """Build the config of a scheduler that diffusers' Stable Diffusion and PixArt pipelines both accept.

    Raises ValueError for a path and prediction that diffusers cannot express.
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
            table = {
                "beta_schedule": next(name for name, kind in _SCHEDULES.items() if isinstance(path, kind)),
                "num_train_timesteps": path.num_train_timesteps,
                "prediction_type": next(theirs for theirs, ours in _NAMES.items() if ours == prediction),
                "rescale_betas_zero_snr": path.zero_terminal_snr,
            }
            betas = {} if isinstance(path, CosinePath) else {name: getattr(path, name) for name in _BETAS}
            return _COMMON | _DPM_SOLVER | table | betas
        case _:
            assert_never(path)


def read_scheduler(file: Path) -> tuple[PathConfig, Prediction]:
    """Read the path and prediction from a scheduler's config. Raises ValueError for those that are not supported."""
    with described_by(file):
        return scheduler_from(read_json(file), source=file)


def scheduler_from(content: Mapping[str, Any], *, source: Path) -> tuple[PathConfig, Prediction]:
    """Parse a scheduler's config. Raises KeyError with the name of a missing key, or ValueError."""
    check_whole_numbers(content, {"num_train_timesteps": 10_000}, source=source)
    kind = content.get("prediction_type", "epsilon")
    if str(content.get("_class_name", "")).startswith("EDM"):
        if kind != "epsilon":
            raise ValueError(f"an EDM scheduler for {kind!r} is not supported, only for 'epsilon'")
        return EDMPath(**{name: content[name] for name in _EDM_NUMBERS if name in content}), "edm"
    if content.get("trained_betas") is not None:
        raise ValueError(f"{source} has trained_betas, a noise schedule of its own: this is not supported")
    if kind == "flow_prediction":
        return RectifiedFlowPath(shift=float(content.get("flow_shift", 1.0))), "velocity"
    schedule = content.get("beta_schedule", "linear")
    if kind not in _NAMES or schedule not in _SCHEDULES:
        raise ValueError(
            f"{source} has prediction_type {kind!r} on beta_schedule {schedule!r}, expected one of "
            f"{sorted(_NAMES)} on one of {sorted(_SCHEDULES)}: this noise path is not supported"
        )
    numbers: dict[str, Any] = {
        "num_train_timesteps": as_whole(content["num_train_timesteps"]),
        "zero_terminal_snr": bool(content.get("rescale_betas_zero_snr")),
    }
    if _SCHEDULES[schedule] is not CosinePath:
        numbers |= {name: content[name] for name in _BETAS}
    return _SCHEDULES[schedule](**numbers), _NAMES[kind]  # pyright: ignore[reportReturnType]
