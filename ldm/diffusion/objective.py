"""What training minimises: which times are drawn, and the loss, weighted the same at every time."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ldm.diffusion.paths import PathConfig
from ldm.diffusion.predictions import Prediction

TimeSampling = Literal["uniform", "logit_normal"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """logit_mean and logit_std are read by logit_normal alone; 0 and 1 are Stable Diffusion 3's."""

    prediction: Prediction
    time_sampling: TimeSampling = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            raise ValueError(f"prediction {self.prediction!r} is unknown; use one of {get_args(Prediction)}")
        if self.time_sampling not in get_args(TimeSampling):
            known = get_args(TimeSampling)
            raise ValueError(f"time_sampling {self.time_sampling!r} is unknown; use one of {known}")
        if not self.logit_std > 0:
            raise ValueError(f"logit_std must be above 0, not {self.logit_std}; Stable Diffusion 3 uses 1.0")


def draw_times(config: ObjectiveConfig, path: PathConfig, uniforms: Tensor) -> Tensor:
    """Training times, float32, one for each supplied uniform number in [0, 1]; nothing is random here.

    logit_normal: t = sigmoid(m + s Phi^-1(u)). Esser et al. 2024 (arXiv 2403.03206), eq. 19.
    """
    u = uniforms.float()
    if config.time_sampling == "logit_normal":
        u = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u))
    return path.training_times(u)


def diffusion_loss(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample: B x ... to B, in float32 whatever the network's dtype."""
    return (output.float() - target.float()).square().flatten(1).mean(1)
