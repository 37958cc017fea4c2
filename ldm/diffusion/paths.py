"""Noise paths x_t = alpha(t) x_0 + sigma(t) eps, from data (t = 0) to noise (t = 1).

A path is a frozen config that is used directly: its methods take times of any shape, each in [0, 1] (not
checked), and return a tensor of that shape, dtype and device. Keep times on the CPU: the tables are
computed there, in float64, which not every accelerator has, and times from elsewhere cost a copy each way.

Paths that come as a table of N noise levels put entry i (i = 0..N-1) at the *node* t = (i + 1) / N; t = 0
is clean data. A time within rounding of a node counts as that node, so float32 times lose nothing there.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class _BetaTablePath(ABC):
    """Variance-preserving path given by betas: alpha_bar_i = prod_{j <= i} (1 - beta_j), alpha^2 = alpha_bar.

    Ho et al. 2020 (arXiv 2006.11239), eq. 4. Between nodes log alpha_bar is linear in t.
    """

    beta_start: float
    beta_end: float
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start {self.beta_start} and beta_end {self.beta_end} must satisfy "
                "0 < beta_start <= beta_end < 1; use for example 0.0001 and 0.02"
            )
        if self.num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}; use 2 or more, as 1000")

    @abstractmethod
    def betas(self) -> Tensor:
        """The N noise variances, float64."""

    def alpha(self, t: Tensor) -> Tensor:
        """alpha = exp(log alpha_bar / 2)."""
        log_alpha_bar, _ = self._interpolate(t)
        return (log_alpha_bar / 2).exp().to(t)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma = sqrt(1 - alpha_bar), by expm1 because alpha_bar is close to 1 near the data."""
        log_alpha_bar, _ = self._interpolate(t)
        return (-log_alpha_bar.expm1()).sqrt().to(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha / dt = alpha (log alpha_bar)' / 2; at a node, the derivative from below."""
        log_alpha_bar, slope = self._interpolate(t)
        return ((log_alpha_bar / 2).exp() * slope / 2).to(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma / dt = -alpha_bar (log alpha_bar)' / (2 sigma); infinite at t = 0."""
        log_alpha_bar, slope = self._interpolate(t)
        return (-log_alpha_bar.exp() * slope / (2 * (-log_alpha_bar.expm1()).sqrt())).to(t)

    def timesteps(self, t: Tensor) -> Tensor:
        """N t - 1, what the network's time embedding sees: the integer i at table entry i."""
        return (self._position(t) - 1).to(t)

    def training_times(self, u: Tensor) -> Tensor:
        """Numbers u in [0, 1] raised to the next node: a uniform u gives every node equally often."""
        n = self.num_train_timesteps
        return ((u.to("cpu", torch.float64) * n).ceil().clamp(1, n) / n).to(u)

    def snap(self, t: Tensor) -> Tensor:
        """Times moved to the nearest node (or 0): the only times that the network saw in training."""
        n = self.num_train_timesteps
        return ((t.to("cpu", torch.float64) * n).round() / n).to(t)

    def _position(self, t: Tensor) -> Tensor:
        """N t in float64, made whole where it is whole up to the rounding of t's dtype; gradients pass."""
        position = t.to("cpu", torch.float64) * self.num_train_timesteps
        excess = (position - position.round()).detach()
        within_rounding = excess.abs() <= position * torch.finfo(t.dtype).eps
        return position - torch.where(within_rounding, excess, 0.0)

    def _interpolate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha_bar(t) and its derivative by t; constant slope within each interval (i/N, (i+1)/N]."""
        table, n = _log_alpha_bar(self), self.num_train_timesteps
        position = self._position(t)
        below = (position.detach().ceil().long() - 1).clamp(0, n - 1)
        left, right = table[below], table[below + 1]
        return torch.lerp(left, right, position - below), (right - left) * n


@lru_cache(maxsize=16)
def _log_alpha_bar(path: _BetaTablePath) -> Tensor:
    """log alpha_bar at t = 0, 1/N, ..., 1, float64; N + 1 numbers."""
    logs = torch.log1p(-path.betas()).cumsum(0)
    return torch.cat([logs.new_zeros(1), logs])


@dataclass(frozen=True, kw_only=True)
class LinearBetaPath(_BetaTablePath):
    """DDPM's path: beta linear in i. Ho et al. 2020, section 4."""

    kind: Literal["linear_beta"] = "linear_beta"
    beta_start: float = 0.0001
    beta_end: float = 0.02

    def betas(self) -> Tensor:
        return torch.linspace(self.beta_start, self.beta_end, self.num_train_timesteps, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class ScaledLinearBetaPath(_BetaTablePath):
    """Stable Diffusion's path: sqrt(beta) linear in i. Rombach et al. 2022 (arXiv 2112.10752)."""

    kind: Literal["scaled_linear_beta"] = "scaled_linear_beta"
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def betas(self) -> Tensor:
        start, end = self.beta_start**0.5, self.beta_end**0.5
        return torch.linspace(start, end, self.num_train_timesteps, dtype=torch.float64) ** 2


@dataclass(frozen=True, kw_only=True)
class RectifiedFlowPath:
    """The straight path alpha = 1 - t, sigma = t. Liu et al. 2022 (arXiv 2209.03003), eq. 1."""

    kind: Literal["rectified_flow"] = "rectified_flow"

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -1)

    def d_sigma(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def timesteps(self, t: Tensor) -> Tensor:
        """1000 t, what the network's time embedding sees."""
        return 1000 * t

    def training_times(self, u: Tensor) -> Tensor:
        """u itself, kept off the ends 0 and 1, which are no mixture of data and noise."""
        margin = torch.finfo(u.dtype).eps
        return u.clamp(margin, 1 - margin)

    def snap(self, t: Tensor) -> Tensor:
        """t itself: every time was seen in training."""
        return t.clone()


PathConfig = LinearBetaPath | ScaledLinearBetaPath | RectifiedFlowPath
