"""Compute the log-likelihood of an image under a denoiser, exactly, along the probability-flow ODE.

Song et al. 2020 (arXiv 2011.13456), section 4.3; Chen et al. 2018 (arXiv 1806.07366), theorem 1. B batch, D dimensions.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion import PathConfig, prior_std
from ldm.diffusion.nodes import floats
from ldm.diffusion.predictions import eps_from_x0, velocity_target
from ldm.samplers import Denoise


def signs(x: Tensor, generator: Sequence[torch.Generator]) -> Tensor:
    """Draw a probe for log_likelihood: 1 or -1 for each element of x, each sample's from its own generator."""
    return torch.stack([torch.randint(0, 2, x.shape[1:], generator=g) for g in generator]).to(x) * 2 - 1


def log_likelihood(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, probe: Tensor) -> Tensor:
    """Return log p(x) in nats, B, for x at times[-1] > 0; times decrease from 1, as a sampler's do.

    dx/dt = f gives d log p / dt = -div f, so that
        log p(x) = log N(x_1; 0, s^2) + integral of div f over t from times[-1] to 1,
    by the fourth-order Runge-Kutta method between the given times. The divergence is Hutchinson's estimate
    v . (df/dx) v from a probe v of signs, like x: unbiased over probes, exact if D = 1.
    """
    if not (times[:-1] > times[1:]).all() or times[-1] <= 0 or times[0] != 1:
        raise ValueError(f"times must decrease strictly from 1 to above 0, not {floats(times)}")
    total = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    rising = times.flip(0)
    for t, t_next in zip(rising[:-1], rising[1:], strict=True):
        h, middle = (t_next - t).item(), (t + t_next) / 2
        f1, d1 = flow(denoise, x, path, t, probe)
        f2, d2 = flow(denoise, x + h / 2 * f1, path, middle, probe)
        f3, d3 = flow(denoise, x + h / 2 * f2, path, middle, probe)
        f4, d4 = flow(denoise, x + h * f3, path, t_next, probe)
        x = x + h / 6 * (f1 + 2 * f2 + 2 * f3 + f4)
        total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    deviation = prior_std(path)
    normal = -(x / deviation).square() / 2 - math.log(deviation * math.sqrt(2 * math.pi))
    return normal.flatten(1).sum(1) + total


def flow(denoise: Denoise, x: Tensor, path: PathConfig, t: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """Return f(x, t) = alpha' x0_hat + sigma' eps_hat, B x ..., and probe . (df/dx) probe, B."""
    alpha, sigma, d_alpha, d_sigma = (of(t).to(x) for of in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoise(x, t)
        f = velocity_target(x0, eps_from_x0(x0, x, alpha, sigma), d_alpha, d_sigma)
        (pulled,) = torch.autograd.grad(f, x, probe)
    return f.detach(), (pulled * probe).flatten(1).sum(1)


def bits_per_dimension(log_likelihood: Tensor, dimensions: int) -> Tensor:
    """Return -log_2 p / D, which may be negative for continuous data such as latents."""
    return -log_likelihood / (dimensions * math.log(2))
