"""Data of which everything is known: one normal, and a mixture of normals in two dimensions.

Their ideal denoisers and the solutions of the ODE are closed-form, so samplers can be held to the truth.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.nodes import Node, Step, ddpm_mean, variance_range
from ldm.diffusion.paths import PathConfig
from ldm.samplers import Denoise

MEAN, STD = 0.4, 0.6
CENTRES = torch.tensor([[1.5, 0.0], [-1.0, 1.0], [-0.5, -1.5]])
SPREAD, SHARES = 0.25, torch.tensor([0.5, 0.3, 0.2])


def double(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def node_at(path: PathConfig, t: Tensor) -> Node:
    return Node(t, path.alpha(t).item(), path.sigma(t).item())


def ideal_denoiser(path: PathConfig, mean: float | Tensor = MEAN, std: float | Tensor = STD) -> Denoise:
    """E[x0 | x_t] for data N(mean, std^2)."""

    known: dict[float, tuple[float, float]] = {}  # samplers come back to a time, and tables are slow

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        if t.item() not in known:
            known[t.item()] = path.alpha(t).item(), path.sigma(t).item()
        alpha, sigma = known[t.item()]
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)

    return denoise


def ideal_scatter(
    path: PathConfig, times: Tensor, denoise: Denoise, std: float = STD
) -> tuple[Denoise, Callable[[], Tensor]]:
    """denoise, and the true variance of each of these steps: that of q(x' | x, x0), and what x0 is uncertain by.

    The second is as a network answers it: of the last evaluation.
    """
    fractions: dict[float, float] = {}
    last: list[Tensor] = []
    for t, t_next in pairwise(times):
        step = Step(node_at(path, t), node_at(path, t_next))
        if step.end.sigma > 0:
            small, large = variance_range(step)
            alpha, sigma = step.start.alpha, step.start.sigma
            uncertain = std**2 * sigma**2 / (alpha**2 * std**2 + sigma**2)
            variance = small + ddpm_mean(step)[1] ** 2 * uncertain
            fractions[t.item()] = 2 * math.log(variance / small) / math.log(large / small) - 1

    def remembering(x: Tensor, t: Tensor) -> Tensor:
        last[:] = [torch.full_like(x, fractions.get(t.item(), math.nan))]
        return denoise(x, t)

    return remembering, lambda: last[0]


def marginal(path: PathConfig, t: Tensor, z: Tensor, mean: float | Tensor = MEAN, std: float | Tensor = STD) -> Tensor:
    """The ODE's solution for data N(mean, std^2): each sample keeps its quantile z of the marginal."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    return alpha * mean + (alpha**2 * std**2 + sigma**2).sqrt() * z


def uneven(start: float, stop: float, steps: int) -> Tensor:
    """steps + 1 numbers whose differences alternate 1 : 3; steps is even."""
    weights = double(*[1.0, 3.0] * (steps // 2)).cumsum(0) / (2 * steps)
    return start + (stop - start) * torch.cat([double(0.0), weights])


def mixture(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    which = torch.multinomial(SHARES, n, replacement=True, generator=generator)
    return CENTRES[which] + SPREAD * torch.randn(n, 2, generator=generator)


def mixture_denoiser(
    path: PathConfig, centres: Tensor = CENTRES, shares: Tensor = SHARES, spread: float = SPREAD
) -> Denoise:
    """E[x0 | x_t], exactly: x_t is N x 2."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = path.alpha(t).to(x), path.sigma(t).to(x)
        variance = alpha**2 * spread**2 + sigma**2
        means = centres.to(x)
        logits = shares.to(x).log() - (x[:, None] - alpha * means).square().sum(2) / (2 * variance)
        each = means + alpha * spread**2 / variance * (x[:, None] - alpha * means)  # N x centres x 2
        return (logits.softmax(1)[..., None] * each).sum(1)

    return denoise
