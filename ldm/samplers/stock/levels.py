"""diffusers' schedulers after k-diffusion, which step in kappa = sigma / alpha: Euler, LMS, Heun, DPM2 and kin.

They keep y = x / alpha, which they also return: where sampling ends above 0, alpha is left out there. Written from the
behaviour of scheduling_{euler,euler_ancestral,lms,heun,k_dpm_2,k_dpm_2_ancestral}_discrete.py, diffusers 0.42.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.nodes import Node
from ldm.samplers.linear_multistep import gauss_legendre, lagrange_integrals
from ldm.samplers.steps import Denoise, Generators, noise_like
from ldm.samplers.stock.grids import position_of
from ldm.samplers.stock.run import StockRun


def slope(run: StockRun, denoise: Denoise, y: Tensor, node: Node) -> Tensor:
    """dy / dkappa = (y - x0_hat) / kappa at a node."""
    return (y - run.limited(denoise(node.alpha * y, node.t))) / (node.sigma / node.alpha)


def ancestral_levels(kappa: float, following: float) -> tuple[float, float]:
    """Return the level to step down to, and the deviation of the noise that leads back up to the following."""
    up = math.sqrt(following**2 * (kappa**2 - following**2) / kappa**2)
    return math.sqrt(max(0.0, following**2 - up**2)), up


def stock_euler(run: StockRun, denoise: Denoise, x: Tensor, generator: Generators) -> Tensor:
    """Euler's method."""
    y = x / run.level_node(run.begin).alpha
    for index in range(run.begin, len(run.grid.timesteps)):
        kappa, following = run.grid.kappas[index : index + 2]
        y = y + slope(run, denoise, y, run.level_node(index)) * (following - kappa)
    return y


def stock_euler_ancestral(run: StockRun, denoise: Denoise, x: Tensor, generator: Generators) -> Tensor:
    """Euler's method to a lower level, and noise."""
    y = x / run.level_node(run.begin).alpha
    for index in range(run.begin, len(run.grid.timesteps)):
        kappa, following = run.grid.kappas[index : index + 2]
        down, up = ancestral_levels(kappa, following)
        y = y + slope(run, denoise, y, run.level_node(index)) * (down - kappa) + up * noise_like(y, generator)
    return y


def stock_lms(run: StockRun, denoise: Denoise, x: Tensor, generator: Generators) -> Tensor:
    """Linear multistep of order 4, also into kappa = 0.

    From an initial image the first weights are still those of four slopes, of which only the newest are there.
    """
    y = x / run.level_node(run.begin).alpha
    slopes: list[Tensor] = []
    for index in range(run.begin, len(run.grid.timesteps)):
        slopes = [slope(run, denoise, y, run.level_node(index)), *slopes[:3]]  # the newest first
        kappas = run.grid.kappas[max(0, index - 3) : index + 1][::-1]
        weights = polynomial_weights(kappas, run.grid.kappas[index + 1])
        y = y + sum(weight * found for weight, found in zip(weights, slopes, strict=False))
    return y


def polynomial_weights(kappas: Sequence[float], end: float) -> list[float]:
    """Integrate the Lagrange polynomials in kappa from kappas[0] to the end."""
    points, weights = gauss_legendre(4)
    half = (end - kappas[0]) / 2
    nodes = torch.tensor(kappas, dtype=torch.float64)
    return lagrange_integrals(nodes, kappas[0] + half * (points + 1), weights * half)


def stock_heun(run: StockRun, denoise: Denoise, x: Tensor, generator: Generators) -> Tensor:
    """Heun's method; a step of Euler's into kappa = 0."""
    first, last = halves(run)
    y = x / run.level_node(first).alpha
    for index in range(first, last + 1):
        kappa, following = run.grid.kappas[index : index + 2]
        found = slope(run, denoise, y, run.level_node(index))
        if index < last:
            after = slope(run, denoise, y + found * (following - kappa), run.level_node(index + 1))
            found = (found + after) / 2
        y = y + found * (following - kappa)
    return y


def halves(run: StockRun) -> tuple[int, int]:
    """Return the indices of the first level and of the last. Methods with two evaluations begin at twice the step."""
    return run.begin // 2, len(run.grid.timesteps) - 1


def stock_dpm2(run: StockRun, denoise: Denoise, x: Tensor, generator: Generators) -> Tensor:
    """DPM2: a step with the slope at the middle of log kappa; a step of Euler's into kappa = 0."""
    first, last = halves(run)
    y = x / run.level_node(first).alpha
    for index in range(first, last + 1):
        kappa, following = run.grid.kappas[index : index + 2]
        found = slope(run, denoise, y, run.level_node(index))
        if following > 0:
            middle = math.sqrt(kappa * following)
            found = slope(run, denoise, y + found * (middle - kappa), middle_node(run, middle))
        y = y + found * (following - kappa)
    return y


def middle_node(run: StockRun, kappa: float) -> Node:
    """Return the node between two steps."""
    place = position_of(run.table, kappa)
    return run.path.add_level(place, kappa, place)


def stock_dpm2_ancestral(run: StockRun, denoise: Denoise, x: Tensor, generator: Generators) -> Tensor:
    """DPM2 to a lower level, and noise."""
    first, last = halves(run)
    y = x / run.level_node(first).alpha
    for index in range(first, last + 1):
        kappa, following = run.grid.kappas[index : index + 2]
        down, up = ancestral_levels(kappa, following)
        found = slope(run, denoise, y, run.level_node(index))
        if following == 0:
            return y + found * (down - kappa)
        middle = math.sqrt(kappa * down)
        found = slope(run, denoise, y + found * (middle - kappa), middle_node(run, middle))
        y = y + found * (down - kappa) + up * noise_like(y, generator)
    return y
