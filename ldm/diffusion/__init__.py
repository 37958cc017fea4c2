"""The mathematics of diffusion: noise paths, predictions, the training objective and its random numbers."""

from ldm.diffusion.objective import ObjectiveConfig, diffusion_loss, draw_times
from ldm.diffusion.paths import LinearBetaPath, PathConfig, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.diffusion.predictions import Prediction, expand_times, noise_sample, target, to_x0
from ldm.diffusion.randomness import SampleRandomness, sample_randomness

__all__ = [
    "LinearBetaPath",
    "ObjectiveConfig",
    "PathConfig",
    "Prediction",
    "RectifiedFlowPath",
    "SampleRandomness",
    "ScaledLinearBetaPath",
    "diffusion_loss",
    "draw_times",
    "expand_times",
    "noise_sample",
    "sample_randomness",
    "target",
    "to_x0",
]
