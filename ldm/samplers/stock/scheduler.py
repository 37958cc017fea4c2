"""What a model's folder states about sampling: a scheduler of diffusers', its class and its values.

A class of diffusers' fixes a sampler, a time grid, the level at which sampling ends and the noise that it begins with.
CLASSES lists those that are followed, with the values that each reads and its own defaults (diffusers 0.42,
schedulers/scheduling_*.py). ldm.samplers.stock.plan turns one of them into steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ldm.files.messages import printable

_SPACED = {"timestep_spacing": "leading", "steps_offset": 0}
_FROM_THE_ENDS = _SPACED | {"timestep_spacing": "linspace"}
_RESCALED = {"rescale_betas_zero_snr": False}
_CONVERTED = {
    "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
    "sigma_min": None, "sigma_max": None,
}  # fmt: skip
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIPPED = {"clip_sample": True, "clip_sample_range": 1.0}
_SOLVER = {"solver_order": 2, "final_sigmas_type": "zero"} | _THRESHOLD | _CONVERTED
_DPM_SOLVER = _SOLVER | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lambda_min_clipped": -math.inf}
_SECOND_ORDER = _FROM_THE_ENDS | _CONVERTED

# The values that a class reads, and its defaults. Everything else in a file is ignored, as there.
CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _SPACED | _RESCALED | _THRESHOLD | _CLIPPED | {"set_alpha_to_one": True},
    "DDPMScheduler": _SPACED | _RESCALED | _THRESHOLD | _CLIPPED | {"variance_type": "fixed_small"},
    "PNDMScheduler": _SPACED | {"skip_prk_steps": False, "set_alpha_to_one": False},
    "LCMScheduler": _RESCALED | _THRESHOLD | _CLIPPED | {
        "clip_sample": False, "original_inference_steps": 50, "timestep_scaling": 10.0,
    },
    "LMSDiscreteScheduler": _SECOND_ORDER,
    "EulerDiscreteScheduler": _SECOND_ORDER | _RESCALED | {
        "interpolation_type": "linear", "final_sigmas_type": "zero", "timestep_type": "discrete",
    },
    "EulerAncestralDiscreteScheduler": _FROM_THE_ENDS | _RESCALED,
    "HeunDiscreteScheduler": _SECOND_ORDER | _CLIPPED | {"clip_sample": False},
    "KDPM2DiscreteScheduler": _SECOND_ORDER,
    "KDPM2AncestralDiscreteScheduler": _SECOND_ORDER,
    "DPMSolverMultistepScheduler": _DPM_SOLVER | _FROM_THE_ENDS | _RESCALED | {
        "lower_order_final": True, "euler_at_final": False, "use_lu_lambdas": False,
    },
    "DPMSolverSinglestepScheduler": _DPM_SOLVER | {"lower_order_final": False},
    "DEISMultistepScheduler": _FROM_THE_ENDS | _THRESHOLD | _CONVERTED | {"solver_order": 2, "lower_order_final": True},
    "UniPCMultistepScheduler": _SOLVER | _FROM_THE_ENDS | _RESCALED | {
        "predict_x0": True, "solver_type": "bh2", "lower_order_final": True, "disable_corrector": (), "solver_p": None,
    },
}  # fmt: skip
# The betas of classes that do not have DDPM's.
BETAS: dict[str, dict[str, Any]] = {
    "LCMScheduler": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    **dict.fromkeys(
        ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
        {"beta_start": 0.00085, "beta_end": 0.012},
    ),
}
DDPM_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
# The names of the methods in A1111.
LABELS = {
    "DDIMScheduler": "DDIM", "DDPMScheduler": "DDPM", "PNDMScheduler": "PLMS", "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS", "EulerDiscreteScheduler": "Euler", "EulerAncestralDiscreteScheduler": "Euler a",
    "HeunDiscreteScheduler": "Heun", "KDPM2DiscreteScheduler": "DPM2", "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "DPMSolverMultistepScheduler": "DPM++ 2M", "DPMSolverSinglestepScheduler": "DPM++ 2S",
    "DEISMultistepScheduler": "DEIS", "UniPCMultistepScheduler": "UniPC",
}  # fmt: skip
_DPM_SOLVERS = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
_ALGORITHMS = {"dpmsolver": "dpmsolver", "dpmsolver++": "dpmsolver++", "deis": "dpmsolver++"}
_SDE = {"sde-dpmsolver++": "sde-dpmsolver++"}
# The words that a value may be, and what each means. Classes take each other's words, as a file may change its class.
_SAME = {
    "timestep_spacing": ("linspace", "leading", "trailing"), "final_sigmas_type": ("zero", "sigma_min"),
    "interpolation_type": ("linear", "log_linear"), "timestep_type": ("discrete", "continuous"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
}  # fmt: skip
WORDS: dict[tuple[str, str], dict[str, str]] = {
    ("DPMSolverMultistepScheduler", "solver_type"): _DPM_SOLVERS,
    ("DPMSolverSinglestepScheduler", "solver_type"): _DPM_SOLVERS,
    ("DPMSolverMultistepScheduler", "algorithm_type"): _ALGORITHMS | _SDE | {"sde-dpmsolver": "sde-dpmsolver"},
    ("DPMSolverSinglestepScheduler", "algorithm_type"): _ALGORITHMS | _SDE,
    ("UniPCMultistepScheduler", "solver_type"): {
        "bh1": "bh1", "bh2": "bh2", "midpoint": "bh2", "heun": "bh2", "logrho": "bh2",
    },
}  # fmt: skip
_WITHIN = {
    "steps_offset": (0, 10_000), "solver_order": (1, 3), "original_inference_steps": (1, 10_000),
    "timestep_scaling": (0, 1e6), "clip_sample_range": (0, 1e6), "sample_max_value": (1, 1e6),
    "dynamic_thresholding_ratio": (0, 1), "sigma_min": (1e-6, 1e6), "sigma_max": (1e-6, 1e6),
    "lambda_min_clipped": (-math.inf, 10),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StockScheduler:
    """A class of diffusers' and all values that it reads. Betas and prediction are the model's."""

    kind: str  # a key of CLASSES
    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    @property
    def label(self) -> str:
        return LABELS[self.kind]

    @property
    def evaluations(self) -> int:
        """Of the denoiser, per step."""
        return 2 if self.kind.startswith(("Heun", "KDPM2")) else 1

    @property
    def has_eta(self) -> bool:
        return self.kind == "DDIMScheduler"

    @property
    def grid(self) -> str:
        """The name of its time grid: that of its noise levels, if they are not those of its timesteps."""
        named = [name for name in ("karras", "exponential", "beta") if self.get(f"use_{name}_sigmas")]
        if self.get("use_lu_lambdas") and not named:
            return "log_snr"
        return named[0] if named else str(self.get("timestep_spacing", "linspace"))

    def describe(self) -> str:
        """Describe in one line, separated by commas, the class, its grid, and what else differs from the defaults."""
        usual = CLASSES[self.kind]
        spacing = "timestep_spacing"
        values = {key: value for key, value in self.values.items() if key != spacing or value != self.grid}
        own = [f"{key} {value}" for key, value in values.items() if value != usual[key] or key == spacing]
        return ", ".join([self.kind, self.grid, *own])


def stock_scheduler(kind: str, content: Mapping[str, Any]) -> StockScheduler:
    """Parse a scheduler's file. Raises ValueError, naming it, for a class or value that is not followed."""
    if kind not in CLASSES:
        raise ValueError(f"the scheduler {printable(repr(kind), 60)} is not followed")
    usual = CLASSES[kind]
    values = {key: _value(kind, key, content.get(key, default), default) for key, default in usual.items()}
    if sum(bool(values.get(f"use_{name}_sigmas")) for name in ("karras", "exponential", "beta")) > 1:
        raise ValueError("more than one of use_karras_sigmas, use_exponential_sigmas and use_beta_sigmas is set")
    found = StockScheduler(kind=kind, values=values)
    _check_together(found)
    return found


def _value(kind: str, key: str, value: Any, default: Any) -> Any:
    """Return a value as its class understands it. Raises ValueError for one that is not followed."""
    if key == "disable_corrector":
        steps = list(cast("list[Any]", value)) if isinstance(value, list | tuple) else None
        valid = steps is not None and len(steps) <= 1000 and all(type(step) is int for step in steps)
        value = tuple(steps or ())
    elif isinstance(default, str):
        words = WORDS.get((kind, key)) or {word: word for word in _SAME[key]}
        valid = isinstance(value, str) and value in words
        value = words[value] if valid else value
    elif isinstance(default, bool):
        value = False if value is None else value
        valid = type(value) is bool
    elif key in ("sigma_min", "sigma_max", "solver_p"):
        valid = value is None or (key != "solver_p" and _is_within(key, value))
    else:
        valid = _is_within(key, value) and (isinstance(default, float) or type(value) is int)
    if not valid:
        raise ValueError(f"{key} {printable(repr(value), 60)} of the scheduler {kind} is not followed")
    return value


def _is_within(key: str, value: Any) -> bool:
    low, high = _WITHIN[key]
    return type(value) in (int, float) and low <= value <= high


def _check_together(scheduler: StockScheduler) -> None:
    """Raise ValueError for values that draw nothing in diffusers either."""
    if scheduler.get("final_sigmas_type") != "zero":
        return
    if str(scheduler.get("algorithm_type", "")) in ("dpmsolver", "sde-dpmsolver"):
        raise ValueError(f"algorithm_type {scheduler['algorithm_type']} into final_sigmas_type zero has no last step")
    if scheduler.kind == "UniPCMultistepScheduler" and not scheduler["lower_order_final"]:
        raise ValueError("UniPC without lower_order_final into final_sigmas_type zero has no last step")


def is_our_default(scheduler: StockScheduler) -> bool:
    """Tell whether this is dpmpp_2m on the trailing grid, which our own exports state and our default draws."""
    if scheduler.kind != "DPMSolverMultistepScheduler":
        return False
    free = ("steps_offset", "lower_order_final", "euler_at_final", "rescale_betas_zero_snr", "sigma_min", "sigma_max",
            "dynamic_thresholding_ratio", "sample_max_value")  # fmt: skip
    usual = CLASSES[scheduler.kind] | {"timestep_spacing": "trailing"}
    return all(scheduler[key] == value for key, value in usual.items() if key not in free)
