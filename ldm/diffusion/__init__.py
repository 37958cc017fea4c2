"""The mathematics of diffusion: noise paths, predictions, the training objective and its random numbers."""

from ldm.diffusion.importance import LossHistory
from ldm.diffusion.objective import ObjectiveConfig, by_quantile, diffusion_loss, draw_times, loss_weight
from ldm.diffusion.paths import EDMPath, PathConfig, RectifiedFlowPath, prior_std
from ldm.diffusion.predictions import Prediction, network_input, noise_sample, target, to_x0
from ldm.diffusion.randomness import SampleRandomness, drop_captions, sample_randomness, spread_uniforms, training_noise
from ldm.diffusion.table_paths import CosinePath, LinearBetaPath, ScaledLinearBetaPath

__all__ = [
    "CosinePath", "EDMPath", "LinearBetaPath", "LossHistory", "ObjectiveConfig", "PathConfig", "Prediction",
    "RectifiedFlowPath", "SampleRandomness", "ScaledLinearBetaPath", "by_quantile", "diffusion_loss", "draw_times",
    "drop_captions", "loss_weight", "network_input", "noise_sample", "prior_std", "sample_randomness",
    "spread_uniforms", "target", "to_x0", "training_noise",
]  # fmt: skip
