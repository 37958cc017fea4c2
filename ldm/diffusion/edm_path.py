"""EDM's path: noise is added to unscaled data."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor


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
