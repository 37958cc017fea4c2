"""DDPM's posterior q(x' | x, x0): its mean, and the range of variances that a network may learn."""

from __future__ import annotations

from torch import Tensor

from ldm.diffusion.nodes import Step


def ddpm_mean(step: Step) -> tuple[float, float]:
    """Compute the coefficients of x and x0 in the mean of q(x' | x, x0): (a sigma'^2 x + alpha' b^2 x0) / sigma^2.

    a = alpha / alpha', b^2 = sigma^2 - a^2 sigma'^2. Ho et al. 2020 (arXiv 2006.11239), eq. 7; for any path and stride
    as in Kingma et al. 2021 (arXiv 2107.00630), appendix A.
    """
    start, end = step
    return (start.alpha / end.alpha * end.sigma**2 / start.sigma**2, end.alpha * variance_added(step) / start.sigma**2)


def variance_range(step: Step) -> tuple[float, float]:
    """Compute the variance of q(x' | x, x0), b^2 sigma'^2 / sigma^2, and the larger b^2. Ho et al. 2020, eq. 7."""
    added = variance_added(step)
    return added * step.end.sigma**2 / step.start.sigma**2, added


def variance_added(step: Step) -> float:
    """Compute b^2 of q(x | x') = N(a x', b^2): beta if the grid has every node. Ho et al. 2020, eq. 2."""
    start, end = step
    return start.sigma**2 - (start.alpha / end.alpha * end.sigma) ** 2


def learned_log_variance(raw_v: Tensor, log_small: float | Tensor, log_large: float | Tensor) -> Tensor:
    """log variance = v log large + (1 - v) log small, v = (raw_v + 1) / 2: raw_v is roughly in [-1, 1].

    Nichol & Dhariwal 2021, eq. 15.
    """
    return log_small + (raw_v + 1) / 2 * (log_large - log_small)
