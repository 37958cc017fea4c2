"""Noise paths x_t = alpha(t) x_0 + sigma(t) eps, from data (t = 0) to noise (t = 1).

A path is a frozen config that is used directly: its methods take times of any shape, each in [0, 1] (not
checked), and return a tensor of that shape, dtype and device. Keep times on the CPU: the tables are
computed there, in float64, which some accelerators lack, and times on other devices are copied back and forth.

    alpha, sigma        the coefficients of data and noise
    d_alpha, d_sigma    their derivatives by t
    log_snr             log(alpha^2 / sigma^2), decreasing from +infinity; time_of_log_snr is its inverse, and
                        log_snr_range its finite range
    input_scale         the factor of x_t in the network's input
    timesteps           the input of the network's time embedding
    training_times      uniform numbers -> times to train at
    default_grid        the name of the default time grid for sampling
    snap                times -> the nearest times that the network was trained at

Paths defined by a table of noise levels are in table_paths.py.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ldm.diffusion.table_paths import CosinePath, LinearBetaPath, ScaledLinearBetaPath


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


@dataclass(frozen=True, kw_only=True)
class EDMPath:
    """alpha = 1, sigma = sigma_max t^rho. Karras et al. 2022 (arXiv 2206.00364), table 1.

    t is linear in sigma^(1 / rho), so that even steps of t are those of eq. 5 down to sigma = 0. The network's input
    and its target have unit variance, if the data's variance is sigma_data^2.
    """

    kind: Literal["edm"] = "edm"
    sigma_min: float = 0.002  # minimum for training and sampling: below it, data count as clean
    sigma_max: float = 80.0
    sigma_data: float = 0.5  # standard deviation of the data: 1 for our latents
    rho: float = 7.0
    default_grid: ClassVar[str] = "karras"  # in ldm.samplers.TIME_GRIDS: even steps of t go far below sigma_min

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf or self.sigma_data <= 0 or self.rho < 1:
            raise ValueError(
                f"sigma_min {self.sigma_min}, sigma_max {self.sigma_max}, sigma_data {self.sigma_data} and rho "
                f"{self.rho} must satisfy 0 < sigma_min < sigma_max, 0 < sigma_data, 1 <= rho; use 0.002, 80, 0.5, 7"
            )

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t**self.rho

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * self.rho * t ** (self.rho - 1)

    def log_snr(self, t: Tensor) -> Tensor:
        """-2 log sigma; infinite at t = 0."""
        return -2 * (math.log(self.sigma_max) + self.rho * t.log())

    @property
    def log_snr_range(self) -> tuple[float, float]:
        return -2 * math.log(self.sigma_max), -2 * math.log(self.sigma_min)

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Invert log_snr; noise above sigma_max gives 1."""
        return ((-log_snr / 2 - math.log(self.sigma_max)) / self.rho).exp().clamp(max=1)

    def input_scale(self, t: Tensor) -> Tensor:
        """c_in = 1 / sqrt(sigma^2 + sigma_data^2)."""
        return (self.sigma(t) ** 2 + self.sigma_data**2).rsqrt()

    def timesteps(self, t: Tensor) -> Tensor:
        """c_noise = log(sigma) / 4, the input of the network's time embedding."""
        return -self.log_snr(t) / 8

    def training_times(self, u: Tensor) -> Tensor:
        """Return u, clamped at sigma_min: at t = 0 the timestep is infinite."""
        return u.clamp(min=(self.sigma_min / self.sigma_max) ** (1 / self.rho))

    def snap(self, t: Tensor) -> Tensor:
        """Return t: training covers all times."""
        return t.clone()


TablePath = LinearBetaPath | ScaledLinearBetaPath | CosinePath
PathConfig = TablePath | RectifiedFlowPath | EDMPath


def prior_std(path: PathConfig, start: float = 1.0) -> float:
    """Standard deviation of x_t at the time where sampling starts: sqrt(alpha^2 s^2 + sigma^2), s = sigma_data.

    It is 1 on table paths, and at t = 1 on all paths but EDM's. (If alpha is not 0 there, as in Stable Diffusion, x_t
    still contains a little of the data; sampling starts from plain noise all the same.)
    """
    t = torch.tensor(start, dtype=torch.float64)
    return (path.alpha(t) ** 2 * path.sigma_data**2 + path.sigma(t) ** 2).sqrt().item()
