"""Variance-preserving paths defined by a table of N noise levels, alpha^2 + sigma^2 = 1.

Entry i (i = 0..N-1) belongs to the *node* t = (i + 1) / N; t = 0 is clean data. A time within rounding error of a node
counts as that node, so that float32 times are exact there. Between nodes log alpha_bar is linear in t.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BetaTablePath(ABC):
    """alpha_bar_i = prod_{j <= i} (1 - beta_j), alpha^2 = alpha_bar. Ho et al. 2020 (arXiv 2006.11239), eq. 4.

    zero_terminal_snr: rescale the table so that the last level contains no data, alpha(1) = 0.
    """

    num_train_timesteps: int = 1000
    zero_terminal_snr: bool = False
    sigma_data: ClassVar[float] = 1.0  # standard deviation of our latents
    default_grid: ClassVar[str] = "trailing"  # in ldm.samplers.TIME_GRIDS

    def __post_init__(self) -> None:
        if not isinstance(cast(object, self.num_train_timesteps), int) or self.num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps is {self.num_train_timesteps}; use an integer, 2 or more")

    @abstractmethod
    def betas(self) -> Tensor:
        """Return the N noise variances before any rescaling, float64."""

    def alpha(self, t: Tensor) -> Tensor:
        """alpha = exp(log alpha_bar / 2)."""
        return self._levels(t)[0].to(t)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma = sqrt(1 - alpha_bar)."""
        return self._levels(t)[1].to(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        """d alpha / dt = alpha (log alpha_bar)' / 2; at a node, the derivative from below."""
        return self._levels(t)[2].to(t)

    def d_sigma(self, t: Tensor) -> Tensor:
        """d sigma / dt = -alpha alpha' / sigma; infinite at t = 0."""
        alpha, sigma, d_alpha = self._levels(t)
        return (-alpha * d_alpha / sigma).to(t)

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log(alpha / sigma); infinite at t = 0, and at t = 1 under zero_terminal_snr."""
        alpha, sigma, _ = self._levels(t)
        return (2 * (alpha.log() - sigma.log())).to(t)

    @property
    def log_snr_range(self) -> tuple[float, float]:
        """log_snr at the noisiest and the cleanest node at which it is finite."""
        n = self.num_train_timesteps
        ends = self.log_snr(torch.tensor([n - self.zero_terminal_snr, 1], dtype=torch.float64) / n)
        return ends[0].item(), ends[1].item()

    def time_of_log_snr(self, log_snr: Tensor) -> Tensor:
        """Invert log_snr; values beyond the ends of the path give 0 or 1."""
        table, n = _log_alpha_bar(self), self.num_train_timesteps
        wanted = torch.nn.functional.logsigmoid(log_snr.to("cpu", torch.float64))  # log alpha_bar
        above = torch.searchsorted(-table, -wanted).clamp(1, n)  # table[above] <= wanted < table[above - 1]
        left, right = table[above - 1], table[above]
        to_zero = right.isneginf()
        linear = (left - wanted) / (left - right.where(~to_zero, left - 1))
        fraction = torch.where(to_zero, -((wanted - left) / 2).expm1(), linear)
        return ((above - 1 + fraction.clamp(0, 1)) / n).to(log_snr)

    def input_scale(self, t: Tensor) -> Tensor:
        """1: x_t has unit variance at every time, if the data have."""
        return torch.ones_like(t)

    def timesteps(self, t: Tensor) -> Tensor:
        """N t - 1, the input of the network's time embedding: the integer i at table entry i."""
        return (self._position(t) - 1).to(t)

    def training_times(self, u: Tensor) -> Tensor:
        """Round u in [0, 1] up to the next node: a uniform u gives every node equally often."""
        n = self.num_train_timesteps
        return ((u.to("cpu", torch.float64) * n).ceil().clamp(min=1) / n).to(u)

    def snap(self, t: Tensor) -> Tensor:
        """Round times to the nearest node (or 0): the only times in training."""
        n = self.num_train_timesteps
        return ((t.to("cpu", torch.float64) * n).round() / n).to(t)

    def _position(self, t: Tensor) -> Tensor:
        """N t in float64, rounded to an integer if within the rounding error of t's dtype; keeps gradients."""
        position = t.to("cpu", torch.float64) * self.num_train_timesteps
        excess = (position - position.round()).detach()
        within_rounding = excess.abs() <= position * torch.finfo(t.dtype).eps
        return position - torch.where(within_rounding, excess, 0.0)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute alpha, sigma and alpha', float64.

        Within each interval (i/N, (i+1)/N], log alpha_bar is linear or, where it falls to -infinity, alpha is.
        """
        table, n = _log_alpha_bar(self), self.num_train_timesteps
        position = self._position(t)
        below = (position.detach().ceil().long() - 1).clamp(0, n - 1)
        left, right, fraction = table[below], table[below + 1], position - below
        to_zero = right.isneginf()
        right = right.where(~to_zero, left)  # log_alpha_bar then stays at left
        log_alpha_bar = torch.lerp(left, right, fraction)
        level = (log_alpha_bar / 2).exp()
        alpha = torch.where(to_zero, level * (1 - fraction), level)
        d_alpha = torch.where(to_zero, -level * n, level * (right - left) * n / 2)
        # expm1, because alpha_bar is close to 1 near the data.
        sigma = torch.where(to_zero, 1 - alpha**2, -log_alpha_bar.expm1()).sqrt()
        return alpha, sigma, d_alpha


@lru_cache(maxsize=16)
def _log_alpha_bar(path: BetaTablePath) -> Tensor:
    """Compute log alpha_bar at t = 0, 1/N, ..., 1, float64; N + 1 numbers."""
    logs = torch.log1p(-path.betas()).cumsum(0)
    if path.zero_terminal_snr:
        logs = 2 * zero_terminal_alphas((logs / 2).exp()).log()
    return torch.cat([logs.new_zeros(1), logs])


def zero_terminal_alphas(alphas: Tensor) -> Tensor:
    """alpha <- (alpha - alpha_N) alpha_1 / (alpha_1 - alpha_N): the first level is kept, the last becomes 0.

    Lin et al. 2023 (arXiv 2305.08891), algorithm 1.
    """
    return (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])


@dataclass(frozen=True, kw_only=True)
class _BetaRangePath(BetaTablePath):
    """A path whose beta runs from beta_start to beta_end."""

    beta_start: float
    beta_end: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(
                f"beta_start {self.beta_start} and beta_end {self.beta_end} must satisfy "
                "0 < beta_start <= beta_end < 1; use for example 0.0001 and 0.02"
            )


@dataclass(frozen=True, kw_only=True)
class LinearBetaPath(_BetaRangePath):
    """DDPM's path: beta linear in i. Ho et al. 2020, section 4."""

    kind: Literal["linear_beta"] = "linear_beta"
    beta_start: float = 0.0001
    beta_end: float = 0.02

    def betas(self) -> Tensor:
        return torch.linspace(self.beta_start, self.beta_end, self.num_train_timesteps, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class ScaledLinearBetaPath(_BetaRangePath):
    """Stable Diffusion's path: sqrt(beta) linear in i. Rombach et al. 2022 (arXiv 2112.10752)."""

    kind: Literal["scaled_linear_beta"] = "scaled_linear_beta"
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def betas(self) -> Tensor:
        start, end = self.beta_start**0.5, self.beta_end**0.5
        return torch.linspace(start, end, self.num_train_timesteps, dtype=torch.float64) ** 2


@dataclass(frozen=True, kw_only=True)
class CosinePath(BetaTablePath):
    """iDDPM's path: alpha_bar(t) = f(t) / f(0), f = cos^2((t + s) / (1 + s) pi / 2), as betas of at most 0.999.

    Nichol & Dhariwal 2021 (arXiv 2102.09672), eq. 17; the limit keeps the last alpha above 0.
    """

    kind: Literal["cosine"] = "cosine"
    offset: float = 0.008  # s: avoids first betas that are too small to learn
    beta_limit: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.offset > 0 or not 0 < self.beta_limit < 1:
            raise ValueError(
                f"offset {self.offset} must be positive and beta_limit {self.beta_limit} between 0 and 1; "
                "use 0.008 and 0.999"
            )

    def betas(self) -> Tensor:
        n = self.num_train_timesteps
        t = torch.arange(n + 1, dtype=torch.float64) / n
        f = ((t + self.offset) / (1 + self.offset) * math.pi / 2).cos() ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=self.beta_limit)


@dataclass(frozen=True, kw_only=True)
class TrainedBetasPath(BetaTablePath):
    """A path of given betas, one per entry, such as diffusers' trained_betas."""

    kind: Literal["trained_betas"] = "trained_betas"
    table: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.table) != self.num_train_timesteps or not all(0 < beta < 1 for beta in self.table):
            raise ValueError(
                f"the table has {len(self.table)} betas, expected {self.num_train_timesteps}, one per timestep, each "
                "between 0 and 1"
            )

    def betas(self) -> Tensor:
        return torch.tensor(self.table, dtype=torch.float64)
