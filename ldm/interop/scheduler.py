"""Which noise path and prediction a model was trained with, as scheduler/scheduler_config.json says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_never

from ldm.diffusion import LinearBetaPath, PathConfig, Prediction, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.interop.files import described_by, read_json

_NAMES = {"epsilon": "eps", "v_prediction": "v"}


def scheduler_config_json(path: PathConfig, prediction: Prediction) -> dict[str, Any]:
    """A DPMSolverMultistepScheduler, which diffusers' Stable Diffusion and PixArt pipelines both accept, for flow too.

    Raises ValueError for a pair that diffusers has no words for.
    """
    content: dict[str, Any] = {
        "_class_name": "DPMSolverMultistepScheduler",
        "_diffusers_version": "0.30.0",
        "algorithm_type": "dpmsolver++",
        "final_sigmas_type": "zero",
        "num_train_timesteps": 1000,
        "solver_order": 2,
        "solver_type": "midpoint",
        "steps_offset": 1,
        "timestep_spacing": "trailing",
    }
    match path:
        case RectifiedFlowPath():
            if prediction != "velocity":
                raise ValueError(f"a rectified flow trained for {prediction!r} cannot be exported, only 'velocity'")
            return content | {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 1.0}
        case LinearBetaPath() | ScaledLinearBetaPath():
            if prediction == "velocity":
                raise ValueError("a diffusion path trained for 'velocity' cannot be exported, only 'eps' and 'v'")
            name = next(theirs for theirs, ours in _NAMES.items() if ours == prediction)
            schedule = "linear" if isinstance(path, LinearBetaPath) else "scaled_linear"
            betas = {"beta_start": path.beta_start, "beta_end": path.beta_end, "beta_schedule": schedule}
            return content | betas | {"prediction_type": name, "num_train_timesteps": path.num_train_timesteps}
        case _:
            assert_never(path)


def read_scheduler(file: Path) -> tuple[PathConfig, Prediction]:
    """The path and prediction of any scheduler's config. Raises ValueError for one that we do not have."""
    content = read_json(file)
    kind = content.get("prediction_type", "epsilon")
    if kind == "flow_prediction" and content.get("flow_shift", 1.0) == 1.0:
        return RectifiedFlowPath(), "velocity"
    schedule = content.get("beta_schedule", "linear")
    paths = {"linear": LinearBetaPath, "scaled_linear": ScaledLinearBetaPath}
    if kind not in _NAMES or schedule not in paths or content.get("rescale_betas_zero_snr"):
        raise ValueError(
            f"{file} asks for prediction_type {kind!r} on beta_schedule {schedule!r}, expected one of "
            f"{sorted(_NAMES)} on one of {sorted(paths)}, or a flow without shift: this noise path is not supported"
        )
    with described_by(file):
        path = paths[schedule](
            beta_start=content["beta_start"],
            beta_end=content["beta_end"],
            num_train_timesteps=content["num_train_timesteps"],
        )
    return path, "eps" if kind == "epsilon" else "v"
