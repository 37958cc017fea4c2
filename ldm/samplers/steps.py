"""What all samplers share: the DDIM step between two nodes, and noise."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ldm.diffusion.nodes import Node, Step

if TYPE_CHECKING:
    from ldm.diffusion import PathConfig

Denoise = Callable[[Tensor, Tensor], Tensor]
Variance = Callable[[], Tensor]  # what the network answered at its last evaluation: see ldm.denoisers.Output
Generators = Sequence[torch.Generator]


def node_between(path: "PathConfig", step: Step, share: float) -> Node:
    """The node at lambda + share h, for a finite h."""
    log_snr = 2 * (step.start.half_log_snr + share * step.h)
    t = path.time_of_log_snr(torch.tensor(log_snr, dtype=torch.float64))
    return Node(t.to(step.start.t), path.alpha(t).item(), path.sigma(t).item())


def noise_like(x: Tensor, generator: Generators) -> Tensor:
    """Standard normal noise of x's shape, image i from generator[i]; float32 from the CPU, then moved."""
    if len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for {len(x)} images; give one for each image")
    return torch.stack([torch.randn(x.shape[1:], generator=g, dtype=torch.float32) for g in generator]).to(x)


def ddim_step(x: Tensor, x0: Tensor, start: Node, end: Node) -> Tensor:
    """x' = alpha' x0 + (sigma' / sigma) (x - alpha x0): keep the noise that x0 implies, at its new level.

    Song et al. 2020 (arXiv 2010.02502), eq. 12 with eta = 0; exact if x0 did not change along the way.
    """
    return end.alpha * x0 + (end.sigma / start.sigma) * (x - start.alpha * x0)


def ancestral(step: Step, eta: float) -> tuple[Node, float]:
    """The node to step to without noise, and the deviation of the noise to add there, which together make step.end.

    up = eta sigma' sqrt(1 - e^(-2h)), down^2 = sigma'^2 - up^2: with eta = 1 what is added is what the step from
    x' to x has added, as DDPM's posterior demands. Song et al. 2020, eq. 16.

    Raises ValueError for an eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected 0 (no noise) to 1 (DDPM's)")
    up = eta * step.end.sigma * math.sqrt(-math.expm1(-2 * step.h))
    down = math.sqrt(max(0.0, step.end.sigma**2 - up**2))
    return step.end._replace(sigma=down), up


def add_noise(x: Tensor, deviation: float | Tensor, generator: Generators) -> Tensor:
    """x + deviation n; x itself where nothing is to be added: then nothing is drawn."""
    if isinstance(deviation, float) and deviation == 0:
        return x
    return x + deviation * noise_like(x, generator)
