"""Functions common to all samplers: the DDIM step between two nodes, and noise."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldm.diffusion.nodes import Node, Step
from ldm.diffusion.paths import PathConfig

Denoise = Callable[[Tensor, Tensor], Tensor]
Variance = Callable[[], Tensor]  # the network's output at its last evaluation: see ldm.denoisers.Output
Generators = Sequence[torch.Generator]


def node_between(path: PathConfig, step: Step, fraction: float) -> Node:
    """Return the node at lambda + fraction h, for a finite h."""
    return node_of(path, step.start.half_log_snr + fraction * step.h, step.start.t)


def node_of(path: PathConfig, half_log_snr: float, like: Tensor) -> Node:
    """Return the node at a finite lambda = log(alpha / sigma); its time has the dtype of `like`."""
    t = path.time_of_log_snr(torch.tensor(2 * half_log_snr, dtype=torch.float64))
    return Node(t.to(like), path.alpha(t).item(), path.sigma(t).item())


def noise_like(x: Tensor, generator: Generators) -> Tensor:
    """Draw standard normal noise of x's shape, image i from generator[i]: float32 on the CPU, then moved."""
    if len(generator) != len(x):
        raise ValueError(f"{len(generator)} generators for {len(x)} images; give one per image")
    return torch.stack([torch.randn(x.shape[1:], generator=g, dtype=torch.float32) for g in generator]).to(x)


def ddim_step(x: Tensor, x0: Tensor, start: Node, end: Node) -> Tensor:
    """x' = alpha' x0 + (sigma' / sigma) (x - alpha x0): keep the noise implied by x0, at its new level.

    Song et al. 2020 (arXiv 2010.02502), eq. 12 with eta = 0; exact if x0 is constant along the step.
    """
    return end.alpha * x0 + (end.sigma / start.sigma) * (x - start.alpha * x0)


def ancestral(step: Step, eta: float) -> tuple[Node, float]:
    """Return the node to step to without noise, and the deviation of the noise to add there to reach step.end.

    up = eta sigma' sqrt(1 - e^(-2h)), down^2 = sigma'^2 - up^2: with eta = 1 the added noise is that of DDPM's
    posterior. Song et al. 2020, eq. 16.

    Raises ValueError for an eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, expected 0 (no noise) to 1 (DDPM's)")
    up = eta * step.end.sigma * math.sqrt(-math.expm1(-2 * step.h))
    down = math.sqrt(max(0.0, step.end.sigma**2 - up**2))
    return step.end._replace(sigma=down), up


def add_noise(x: Tensor, deviation: float | Tensor, generator: Generators) -> Tensor:
    """Return x + deviation n; if the deviation is 0, x itself, without drawing noise."""
    if isinstance(deviation, float) and deviation == 0.0:
        return x
    return x + deviation * noise_like(x, generator)
