"""The training objective: the distribution of times, the weight of the error at each, and the added noise.

The loss is the mean of w(t) || output - target ||^2 over t = g(u) of uniform numbers u: time_numbers selects how these
are spread, time_sampling selects g, weighting selects w.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, assert_never, cast, get_args

import torch
from torch import Tensor

from ldm.diffusion.paths import PathConfig
from ldm.diffusion.predictions import Prediction, x0_sensitivity

TimeSampling = Literal["uniform", "logit_normal", "log_normal", "importance"]
TimeNumbers = Literal["independent", "stratified", "sobol"]
Weighting = Literal["constant", "min_snr", "soft_min_snr", "edm", "logit_normal", "cosmap"]


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Settings of the objective. The defaults are plain diffusion; each number is used only by the named options."""

    prediction: Prediction
    time_sampling: TimeSampling = "uniform"
    time_numbers: TimeNumbers = "independent"
    logit_mean: float = 0.0  # of logit_normal, like logit_std; 0 and 1 are Stable Diffusion 3's
    logit_std: float = 1.0
    log_mean: float = -1.2  # of log(sigma / alpha) under log_normal, like log_std; these are EDM's
    log_std: float = 1.2
    weighting: Weighting = "constant"
    snr_limit: float = 5.0  # gamma of min_snr and soft_min_snr
    offset_noise: float = 0.0  # strength of noise that is constant over a channel; 0.1 is usual
    input_perturbation: float = 0.0  # strength of noise in the input that is not in the target; 0.1 is usual
    learned_variance: bool = False  # as in iDDPM and DiT: the network also predicts the variance of DDPM's steps
    variance_weight: float = 0.001  # of the bound's N terms in addition to the loss, with learned_variance

    def __post_init__(self) -> None:
        for name, kind in (("prediction", Prediction), ("time_sampling", TimeSampling), ("time_numbers", TimeNumbers),
                           ("weighting", Weighting)):  # fmt: skip
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; use one of {get_args(kind)}")
        for name in ("logit_std", "log_std", "snr_limit"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("offset_noise", "input_perturbation", "variance_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more, not {getattr(self, name)}")


def draw_times(config: ObjectiveConfig, path: PathConfig, uniforms: Tensor) -> Tensor:
    """Map numbers in [0, 1] monotonically to training times, float32; nothing is random here.

    For importance the numbers are a LossHistory's, for the others they are uniform.
    """
    u = uniforms.float()
    match config.time_sampling:
        case "uniform" | "importance":
            t = u
        case "logit_normal":
            t = logit_normal_times(u, config.logit_mean, config.logit_std)
        case "log_normal":
            t = log_normal_times(u, path, config.log_mean, config.log_std)
        case _:
            assert_never(config.time_sampling)
    return path.training_times(t)


def logit_normal_times(u: Tensor, mean: float, std: float) -> Tensor:
    """t = sigmoid(m + s Phi^-1(u)). Esser et al. 2024 (arXiv 2403.03206), eq. 19."""
    return torch.sigmoid(mean + std * normal_quantile(u))


def log_normal_times(u: Tensor, path: PathConfig, mean: float, std: float) -> Tensor:
    """log(sigma / alpha) = m + s Phi^-1(u). Karras et al. 2022 (arXiv 2206.00364), table 1."""
    return path.time_of_log_snr(-2 * (mean + std * normal_quantile(u)))


def normal_quantile(u: Tensor) -> Tensor:
    """Phi^-1(u), the inverse of the standard normal distribution's cumulative function."""
    return cast(Any, torch.special).ndtri(u)


def loss_weight(config: ObjectiveConfig, path: PathConfig, t: Tensor) -> Tensor:
    """Compute w(t), of t's shape.

    Weights that papers define for the error of x0_hat (all but "constant" and Stable Diffusion 3's) are converted to
    the output's error: || x0_hat - x_0 ||^2 = (d x0_hat / d output)^2 || output - target ||^2.
    """
    match config.weighting:
        case "constant":
            return torch.ones_like(t)
        case "min_snr":
            return min_snr(path.log_snr(t), config.snr_limit) * x0_sensitivity(config.prediction, path, t)
        case "soft_min_snr":
            return soft_min_snr(path.log_snr(t), config.snr_limit) * x0_sensitivity(config.prediction, path, t)
        case "edm":
            return edm_weight(path, t) * x0_sensitivity(config.prediction, path, t)
        case "logit_normal":
            return logit_normal_density(t, config.logit_mean, config.logit_std)
        case "cosmap":
            return cosmap_density(t)
        case _:
            assert_never(config.weighting)


def min_snr(log_snr: Tensor, limit: float) -> Tensor:
    """min(SNR, gamma), for x0's error. Hang et al. 2023 (arXiv 2303.09556), section 3.4.

    So eps's error gets min(SNR, gamma) / SNR, and v's, on variance-preserving paths, min(SNR, gamma) / (SNR + 1).
    """
    return log_snr.clamp(max=math.log(limit)).exp()


def soft_min_snr(log_snr: Tensor, limit: float) -> Tensor:
    """SNR gamma / (SNR + gamma), a smooth minimum. Crowson et al. 2024 (arXiv 2401.11605), section 3.3."""
    return limit * torch.sigmoid(log_snr - math.log(limit))


def edm_weight(path: PathConfig, t: Tensor) -> Tensor:
    """lambda = (alpha^2 s^2 + sigma^2) / (sigma s)^2, s = sigma_data, for x0's error, so that F's gets 1.

    Karras et al. 2022, table 1, where alpha = 1.
    """
    alpha, sigma, deviation = path.alpha(t), path.sigma(t), path.sigma_data
    return (alpha**2 * deviation**2 + sigma**2) / (sigma * deviation) ** 2


def logit_normal_density(t: Tensor, mean: float, std: float) -> Tensor:
    """The density of logit_normal_times: uniform times with this weight give the same mean loss.

    0 at both ends. Esser et al. 2024, eq. 19.
    """
    t = t.clamp(torch.finfo(t.dtype).eps, 1 - torch.finfo(t.dtype).eps)
    return torch.exp(-((torch.logit(t) - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi) * t * (1 - t))


def cosmap_density(t: Tensor) -> Tensor:
    """2 / (pi (1 - 2 t + 2 t^2)): density of the flow times with the log-SNRs of the cosine path's uniform times.

    Esser et al. 2024, eq. 21.
    """
    return 2 / (math.pi * (1 - 2 * t + 2 * t**2))


def offset_noise(eps: Tensor, channel_noise: Tensor, strength: float) -> Tensor:
    """(eps + s n) / sqrt(1 + s^2), n one number per channel: the network learns to change an image's mean brightness.

    Guttenberg 2023, "Diffusion with offset noise", but normalised to unit variance. eps B x C x h x w, n B x C.
    """
    return (eps + strength * channel_noise[:, :, None, None]) / math.sqrt(1 + strength**2)


def input_perturbation(eps: Tensor, more: Tensor, strength: float) -> Tensor:
    """eps + s n: the noise added to the data, while eps stays the target. Ning et al. 2023 (arXiv 2301.11706), eq. 9.

    In training x_t contains true data, in sampling the network's own inexact estimates: this compensates for that.
    """
    return eps + strength * more


def diffusion_loss(output: Tensor, target: Tensor) -> Tensor:
    """Compute each sample's mean squared error: B x ... to B, in float32 for any dtype of the network."""
    return (output.float() - target.float()).square().flatten(1).mean(1)


def by_quantile(losses: Tensor, uniforms: Tensor, parts: int = 4) -> dict[str, Tensor]:
    """Split losses, B, by quantile of their times: from "loss_q1", the cleanest quarter, to "loss_q4", the noisiest.

    Times increase with their uniform numbers, B, which are therefore the quantiles. A part may be empty.
    """
    part = (uniforms * parts).long().to(losses.device)
    return {f"loss_q{i + 1}": losses[part == i] for i in range(parts)}
