"""Nodes of a path, the steps between them, which samplers take, and DDPM's posterior q(x' | x, x0) over a step.

Everything is expressed in (alpha, sigma), never in sigma / alpha, which is infinite at alpha = 0, where rectified flow
starts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

from torch import Tensor

from ldm.diffusion.paths import PathConfig


class Node(NamedTuple):
    """A time, and the path's alpha and sigma at it."""

    t: Tensor
    alpha: float
    sigma: float

    @property
    def half_log_snr(self) -> float:
        """lambda = log(alpha / sigma), including its infinite limits."""
        if self.alpha == 0:
            return -math.inf
        return math.log(self.alpha / self.sigma) if self.sigma > 0 else math.inf


class Step(NamedTuple):
    """A step from a node to the next of the grid; sigma > 0 at the start and alpha > 0 at the end."""

    start: Node
    end: Node

    @property
    def h(self) -> float:
        """The step size in lambda; infinite from alpha = 0 and to sigma = 0."""
        return self.end.half_log_snr - self.start.half_log_snr


def nodes_at(path: PathConfig, times: Tensor) -> list[Node]:
    """Compute the nodes at 1-D times."""
    return [Node(*node) for node in zip(times, floats(path.alpha(times)), floats(path.sigma(times)), strict=True)]


def floats(values: Tensor) -> list[float]:
    """Convert a 1-D tensor; the type of its own `tolist` is open."""
    return cast(Any, values).tolist()


def grid_steps(path: PathConfig, times: Tensor) -> Iterator[Step]:
    """Yield the grid's steps in order. Raises ValueError unless the times decrease strictly within [0, 1]."""
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"times must be a 1-D tensor of two or more numbers, not of shape {tuple(times.shape)}")
    if not (times[:-1] > times[1:]).all() or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"times must decrease strictly, from at most 1 to at least 0, not {floats(times)}")
    nodes = nodes_at(path, times)
    if any(node.sigma == 0 for node in nodes[:-1]):
        raise ValueError(f"times are {floats(times)}, some of which leave no noise: remove those so close to 0")
    for start, end in zip(nodes[:-1], nodes[1:], strict=True):
        yield Step(start, end)


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
