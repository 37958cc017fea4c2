"""Rectified flow's straight path."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RectifiedFlowPath:
    """alpha = 1 - s, sigma = s. Liu et al. 2022 (arXiv 2209.03003), eq. 1.

    s = shift t / (1 + (shift - 1) t): a shift above 1 spends more time at high noise, which large images need, because
    the same noise hides less of them. To go from n latents to m, multiply the shift by sqrt(m / n).
    Esser et al. 2024 (arXiv 2403.03206), eq. 23.
    """

    kind: Literal["rectified_flow"] = "rectified_flow"
    shift: float = 1.0
    sigma_data: ClassVar[float] = 1.0  # standard deviation of our latents
    default_grid: ClassVar[str] = "trailing"  # in ldm.samplers.TIME_GRIDS

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"shift is {self.shift}; it must be positive, 1 for none, 3 in Stable Diffusion 3")

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def alpha(self, t: Tensor) -> Tensor:
        """1 - s = (1 - t) / (1 + (shift - 1) t), without cancellation near the noise."""
        return (1 - t) / (1 + (self.shift - 1) * t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """ds/dt = shift / (1 + (shift - 1) t)^2."""
        return self.shift / (1 + (self.shift - 1) * t) ** 2

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.d_sigma(t)

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log((1 - t) / (shift t)); infinite at both ends."""
        return 2 * (torch.log1p(-t) - (self.shift * t).log())

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """log_snr at s = 0.999 and s = 0.001, the ends of the usual thousand timesteps."""
        return -2 * math.log(999), 2 * math.log(999)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Invert log_snr: t = 1 / (1 + shift exp(log_snr / 2))."""
        return 1 / (1 + self.shift * (log_snr / 2).exp())

    def input_scale(self, t: Tensor) -> Tensor:
        """1: x_t is passed to the network unscaled."""
        return torch.ones_like(t)

    def timesteps(self, t: Tensor) -> Tensor:
        """1000 s, the input of the network's time embedding."""
        return 1000 * self.sigma(t)

    def training_times(self, u: Tensor) -> Tensor:
        """Return u, clamped away from 0 and 1, which are not mixtures of data and noise."""
        margin = torch.finfo(u.dtype).eps
        return u.clamp(margin, 1 - margin)

    def snap(self, t: Tensor) -> Tensor:
        """Return t: training covers all times."""
        return t.clone()
