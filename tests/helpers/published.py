"""Facts of published models, as their configuration files state them."""

from __future__ import annotations

from typing import Any

_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
_OF_STABLE_DIFFUSION = _BETAS | {
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, "clip_sample": False,
}  # fmt: skip
# scheduler/scheduler_config.json of each model, without the version of diffusers that wrote it.
SCHEDULERS: dict[str, dict[str, Any]] = {
    "sd14": {"_class_name": "PNDMScheduler"} | _OF_STABLE_DIFFUSION,
    "sd15": {"_class_name": "PNDMScheduler"} | _OF_STABLE_DIFFUSION,
    "sd15-inpainting": {"_class_name": "DDIMScheduler"} | _OF_STABLE_DIFFUSION,
    "sd21-base": {"_class_name": "PNDMScheduler", "prediction_type": "epsilon"} | _OF_STABLE_DIFFUSION,
    "sd21": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"} | _OF_STABLE_DIFFUSION,
    "sd2-inpainting": {"_class_name": "PNDMScheduler"} | _OF_STABLE_DIFFUSION,
    "pixart-alpha": {
        "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "beta_end": 0.02,
        "beta_schedule": "linear", "beta_start": 0.0001, "dynamic_thresholding_ratio": 0.995, "euler_at_final": False,
        "lambda_min_clipped": float("-inf"), "lower_order_final": True, "num_train_timesteps": 1000,
        "prediction_type": "epsilon", "sample_max_value": 1.0, "solver_order": 2, "solver_type": "midpoint",
        "steps_offset": 0, "thresholding": False, "timestep_spacing": "linspace", "trained_betas": None,
        "use_karras_sigmas": False, "use_lu_lambdas": False, "variance_type": None,
    },
}  # fmt: skip
