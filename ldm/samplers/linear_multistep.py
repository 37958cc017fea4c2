"""Adams-Bashforth methods: the noise eps as a polynomial through its values at earlier nodes.

x' / alpha' = x / alpha + the integral of eps over kappa = sigma / alpha. The methods differ in the polynomial and its
variable. A step from alpha = 0, where kappa is infinite, is a DDIM step, and its eps is not reused. A step to sigma = 0
is like any other, as in k-diffusion and diffusers, except for `deis`, whose variable is infinite there: it takes a DDIM
step.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from ldm.diffusion.nodes import Node, Step, grid_steps, nodes_at
from ldm.diffusion.paths import PathConfig
from ldm.samplers.steps import Denoise, Generators, ddim_step


def lms(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """Linear multistep, order 4: the noise eps as a polynomial in kappa = sigma / alpha through its last four values.

    x' / alpha' = x / alpha + sum_j c_j eps_j, c_j = integral of the j-th Lagrange polynomial over kappa: the
    Adams-Bashforth method on an uneven grid. Liu et al. 2022 (arXiv 2202.09778), eq. 12, is the case of even grids.
    """
    return adams(denoise, x, path, times, order=4, variable=lambda kappa: kappa, to_zero=True)


def deis(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """DEIS (order 3): like lms, but the noise is a polynomial in log(kappa), along which it changes more evenly.

    Zhang & Chen 2022 (arXiv 2204.13902), eq. 15 with rho = kappa.
    """
    return adams(denoise, x, path, times, order=3, variable=torch.log)


def adams(
    denoise: Denoise,
    x: Tensor,
    path: PathConfig,
    times: Tensor,
    *,
    order: int,
    variable: Callable[[Tensor], Tensor],
    to_zero: bool = False,
) -> Tensor:
    """Step by x' / alpha' = x / alpha + integral of eps over kappa, eps a polynomial in variable(kappa).

    to_zero: whether the variable is finite at kappa = 0, so that a step to there may be of this kind.
    """
    history: list[tuple[float, Tensor]] = []  # (kappa, eps), the newest last
    for step in grid_steps(path, times):
        start, end = step
        x0 = denoise(x, start.t)
        if start.alpha == 0 or (end.sigma == 0 and not to_zero):
            x = ddim_step(x, x0, start, end)
            continue
        history = [*history[1 - order :], (start.sigma / start.alpha, (x - start.alpha * x0) / start.sigma)]
        weights = adams_weights(tuple(kappa for kappa, _ in history), end.sigma / end.alpha, variable)
        if end.sigma > 0:
            x = end.alpha * (x / start.alpha + sum(w * eps for w, (_, eps) in zip(weights, history, strict=True)))
        else:  # the same, without the difference of large numbers that a single step from high noise would be
            newest = history[-1][1]
            x = x0 + sum(w * (eps - newest) for w, (_, eps) in zip(weights[:-1], history[:-1], strict=True))
    return x


def adams_weights(kappas: Sequence[float], end: float, variable: Callable[[Tensor], Tensor]) -> list[float]:
    """Return c_j = integral of the Lagrange polynomials in variable(k) over k from kappas[-1] to end.

    By Gaussian quadrature in log k, which is exact to the last digits for any grid in use. To end = 0 it is in k, which
    is exact for a polynomial in k.
    """
    points, weights = gauss_legendre(24)
    if end == 0:
        k, measure = kappas[-1] * (1 - points) / 2, weights * -kappas[-1] / 2
    else:
        low, high = math.log(kappas[-1]), math.log(end)
        k = (low + (high - low) * (points + 1) / 2).exp()
        measure = weights * k * (high - low) / 2  # dk = k d(log k)
    return lagrange_integrals(variable(torch.tensor(kappas, dtype=torch.float64)), variable(k), measure)


def lagrange_integrals(nodes: Tensor, points: Tensor, measure: Tensor) -> list[float]:
    """Integrate prod_{m != j} (v - v_m) / (v_j - v_m) for each node j, as a sum over points with this measure."""
    found: list[float] = []
    for j, node in enumerate(nodes):
        others = torch.cat([nodes[:j], nodes[j + 1 :]])
        basis = ((points[:, None] - others) / (node - others)).prod(1)
        found.append((measure * basis).sum().item())
    return found


@cache
def gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Return points and weights on [-1, 1], exact for polynomials to degree 2 n - 1. Golub & Welsch 1969."""
    i = torch.arange(1, n, dtype=torch.float64)
    off = i / (4 * i**2 - 1).sqrt()
    points, vectors = cast(Any, torch.linalg).eigh(torch.diag(off, -1))  # reads only the lower triangle
    return points, 2 * vectors[0] ** 2


# ------------------------------------------------------------------------------------ pseudo numerical methods


def plms(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """PLMS, order 2: a DDIM step with the Adams-Bashforth mean of the last four eps, which on even steps is (55 eps_0 -
    59 eps_1 + 37 eps_2 - 9 eps_3) / 24. The first step is taken twice, the second time with the mean of eps at both
    ends.

    Liu et al. 2022 (arXiv 2202.09778), S-PNDM's start and eq. 12; the sampler of Stable Diffusion's first code.
    """
    return pseudo_adams(denoise, x, path, times, start=both_ends, started=1)


def pndm(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """F-PNDM, order 2: like plms, but the first three steps are Runge-Kutta steps of four evaluations each.

    Liu et al. 2022, algorithm 2.
    """
    return pseudo_adams(denoise, x, path, times, start=runge_kutta, started=3)


Eps = Callable[[Tensor, Node], Tensor]  # the noise in x at a node
Start = Callable[[Eps, PathConfig, Tensor, Tensor, Step], Tensor]


def pseudo_adams(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, *, start: Start, started: int) -> Tensor:
    """Step by x' = DDIM(x, mean of eps over the step), eps a cubic in t; `start` gives the mean for the first `started`
    steps.

    The mean is over t, not kappa, as if kappa changed evenly along the step: hence order 2, "pseudo". A step from
    alpha = 0 is a DDIM step, and so is one of the first that ends at sigma = 0, where `start` cannot evaluate eps.
    """

    def eps_at(x: Tensor, node: Node) -> Tensor:
        return (x - node.alpha * denoise(x, node.t)) / node.sigma

    history: list[tuple[float, Tensor]] = []  # (t, eps), the newest last
    for step in grid_steps(path, times):
        if step.start.alpha == 0 or (step.end.sigma == 0 and started > 0):
            x = ddim_step(x, denoise(x, step.start.t), *step)
            continue
        eps = eps_at(x, step.start)
        history = [*history[-3:], (step.start.t.item(), eps)]
        if started > 0:
            started -= 1
            mean = start(eps_at, path, x, eps, step)
        else:
            weights = mean_weights([t for t, _ in history], step.end.t.item())
            mean = sum((w * e for w, (_, e) in zip(weights, history, strict=True)), torch.zeros_like(x))
        x = transfer(x, mean, *step)
    return x


def both_ends(eps_at: Eps, path: PathConfig, x: Tensor, eps: Tensor, step: Step) -> Tensor:
    """Return (eps + eps') / 2, where eps' is at the end of the step with eps."""
    return (eps + eps_at(transfer(x, eps, *step), step.end)) / 2


def runge_kutta(eps_at: Eps, path: PathConfig, x: Tensor, eps: Tensor, step: Step) -> Tensor:
    """Return (eps_1 + 2 eps_2 + 2 eps_3 + eps_4) / 6 of the classical Runge-Kutta method, its middle halfway in t."""
    start, end = step
    (middle,) = nodes_at(path, (start.t + end.t)[None] / 2)
    eps_2 = eps_at(transfer(x, eps, start, middle), middle)
    eps_3 = eps_at(transfer(x, eps_2, start, middle), middle)
    eps_4 = eps_at(transfer(x, eps_3, start, end), end)
    return (eps + 2 * eps_2 + 2 * eps_3 + eps_4) / 6


def transfer(x: Tensor, eps: Tensor, start: Node, end: Node) -> Tensor:
    """Take a DDIM step in terms of eps: x' = alpha' (x - sigma eps) / alpha + sigma' eps. Liu et al. 2022, eq. 11."""
    return end.alpha / start.alpha * (x - start.sigma * eps) + end.sigma * eps


def mean_weights(nodes: Sequence[float], end: float) -> list[float]:
    """Return the mean of the Lagrange polynomials over t from nodes[-1] to end."""
    points, weights = gauss_legendre(4)
    t = nodes[-1] + (end - nodes[-1]) * (points + 1) / 2
    return lagrange_integrals(torch.tensor(nodes, dtype=torch.float64), t, weights / 2)
