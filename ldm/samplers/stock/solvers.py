"""diffusers' DPM-Solvers, with earlier steps (multistep) and with steps within the step (singlestep), and DEIS.

Written from the behaviour of scheduling_dpmsolver_{multistep,singlestep}.py and scheduling_deis_multistep.py, diffusers
0.42. Lambda is log(alpha / sigma), as in `Node.half_log_snr`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.diffusion.nodes import Node
from ldm.samplers.linear_multistep import adams_weights
from ldm.samplers.steps import Denoise, Generators, noise_like
from ldm.samplers.stock.run import StockRun, eps_of

FEW_STEPS = 15  # below it, lower_order_final has an effect


def estimate(run: StockRun, denoise: Denoise, x: Tensor, node: Node, *, of_noise: bool) -> Tensor:
    """Return x0_hat, limited, at a node, or the noise that follows from it."""
    x0 = run.limited(denoise(x, node.t))
    return eps_of(x0, x, node) if of_noise else x0


def solver_step(
    run: StockRun, x: Tensor, start: Node, end: Node, terms: Sequence[Tensor], noise: Tensor | None, *, midpoint: bool
) -> Tensor:
    """Step by the exponential integrator for a polynomial in lambda with these terms: value, slope, curvature.

    Lu et al. 2022 (arXiv 2211.01095), eqs. 9 to 13, and (arXiv 2206.00927), eqs. 3.7 to 3.9 for estimates of the noise;
    the stochastic ones have twice the drift. midpoint: half of the slope, in place of its exact weight.
    """
    algorithm = str(run.scheduler["algorithm_type"])
    h = end.half_log_snr - start.half_log_snr
    if h == 0:
        return x
    stochastic = algorithm.startswith("sde")
    if algorithm.endswith("++"):
        z, scale = (-2 * h if stochastic else -h), end.alpha
        kept = end.sigma / start.sigma * (math.exp(-h) if stochastic else 1)
    else:
        z, scale = h, end.sigma * (2 if stochastic else 1)
        kept = end.alpha / start.alpha
    x = kept * x - scale * math.expm1(z) * terms[0]
    if len(terms) == 2 and midpoint:
        x = x - scale * math.expm1(z) / 2 * terms[1]
    elif len(terms) > 1:
        x = x + scale * (1 - math.expm1(z) / z) * terms[1]
    if len(terms) > 2:
        # The stochastic one adds the half that all others subtract: so it is there.
        half = 0.5 if stochastic else -0.5
        x = x - scale * ((math.expm1(z) - z) / z**2 + half) * terms[2]
    if noise is None:
        return x
    return x + end.sigma * math.sqrt(-math.expm1(-2 * h) if z < 0 else math.expm1(2 * h)) * noise


def stock_dpm_multistep(run: StockRun, denoise: Denoise, x: Tensor, generator: Generators) -> Tensor:
    """DPM-Solver with the estimates of earlier steps."""
    scheduler, count = run.scheduler, len(run.grid.timesteps)
    algorithm, few = str(scheduler["algorithm_type"]), scheduler["lower_order_final"] and count < FEW_STEPS
    found: list[Tensor] = []
    for index in range(run.begin, count):
        nodes = [run.level_node(index - back) for back in range(min(len(found), 2) + 1)]
        estimated = estimate(run, denoise, x, nodes[0], of_noise=not algorithm.endswith("++"))
        found = [estimated, *found[:2]]  # the newest first
        order = min(int(scheduler["solver_order"]), len(found))
        if index == count - 1 and (few or scheduler["euler_at_final"] or scheduler["final_sigmas_type"] == "zero"):
            order = 1
        elif index == count - 2 and few:
            order = min(order, 2)
        noise = noise_like(x, generator) if algorithm.startswith("sde") else None
        end = run.level_node(index + 1)
        terms = earlier_terms(nodes[:order], end, found)
        x = solver_step(run, x, nodes[0], end, terms, noise, midpoint=scheduler["solver_type"] == "midpoint")
    return x


def earlier_terms(nodes: Sequence[Node], end: Node, found: Sequence[Tensor]) -> list[Tensor]:
    """Return value, slope and curvature at the start of a step, by differences to earlier nodes, the newest first."""
    if len(nodes) == 1:
        return [found[0]]
    h = end.half_log_snr - nodes[0].half_log_snr
    ratios = [(later.half_log_snr - earlier.half_log_snr) / h for later, earlier in zip(nodes, nodes[1:], strict=False)]
    slopes = [(found[i] - found[i + 1]) / ratio for i, ratio in enumerate(ratios)]
    if len(nodes) == 2:
        return [found[0], slopes[0]]
    bend = (slopes[0] - slopes[1]) / (ratios[0] + ratios[1])
    return [found[0], slopes[0] + ratios[0] * bend, bend]


def singlestep_orders(run: StockRun) -> list[int]:
    """List the orders of the evaluations: 1, 2 and 3 within a step, and lower ones at the end."""
    order, steps = int(run.scheduler["solver_order"]), len(run.grid.timesteps)
    ends_clean = run.scheduler["final_sigmas_type"] == "zero"
    pattern, rest = list(range(1, order + 1)), steps % order
    if run.scheduler["lower_order_final"] or rest or ends_clean:
        whole = steps // order - (rest == 0 and order > 1)
        tail = {1: [], 2: [[1, 1], [1]], 3: [[1, 2, 1], [1], [1, 2]]}[order]
        orders = pattern * whole + (tail[rest] if tail else [])
    else:
        orders = pattern * (steps // order)
    return [*orders[:-1], 1] if ends_clean else orders


def stock_dpm_singlestep(run: StockRun, denoise: Denoise, x: Tensor, generator: Generators) -> Tensor:
    """DPM-Solver whose steps have inner evaluations: each evaluation steps anew from the start of its step."""
    scheduler, orders = run.scheduler, singlestep_orders(run)
    algorithm, midpoint = str(scheduler["algorithm_type"]), scheduler["solver_type"] == "midpoint"
    found: list[Tensor] = []
    origin = x
    for index in range(run.begin, len(run.grid.timesteps)):
        nodes = [run.level_node(index - back) for back in range(min(len(found), 2) + 1)]
        estimated = estimate(run, denoise, x, nodes[0], of_noise=not algorithm.endswith("++"))
        found = [estimated, *found[: int(scheduler["solver_order"]) - 1]]
        order = min(orders[index], len(found))
        noise = noise_like(x, generator) if algorithm.startswith("sde") else None
        origin = x if order == 1 else origin
        end = run.level_node(index + 1)
        terms = inner_terms(nodes[:order], end, found, midpoint=midpoint)
        # Of order 3 the midpoint is one slope with its exact weight.
        x = solver_step(run, origin, nodes[order - 1], end, terms, noise, midpoint=midpoint and order == 2)
    return x


def inner_terms(nodes: Sequence[Node], end: Node, found: Sequence[Tensor], *, midpoint: bool) -> list[Tensor]:
    """Return value, slope and curvature at the start of a step, the oldest of the nodes."""
    if len(nodes) == 1:
        return [found[0]]
    start = nodes[-1].half_log_snr
    h, first = end.half_log_snr - start, found[len(nodes) - 1]
    ratios = [(node.half_log_snr - start) / h for node in nodes[:-1]]
    slopes = [(value - first) / ratio for value, ratio in zip(found, ratios, strict=False)]
    if len(nodes) == 2 or midpoint:
        return [first, slopes[0]]
    outer, inner = ratios
    slope = (outer * slopes[1] - inner * slopes[0]) / (outer - inner)
    return [first, slope, 2 * (slopes[0] - slopes[1]) / (outer - inner)]


def stock_deis(run: StockRun, denoise: Denoise, x: Tensor, generator: Generators) -> Tensor:
    """DEIS: the noise as a polynomial in log kappa. Zhang & Chen 2022 (arXiv 2204.13902), eq. 15."""
    count = len(run.grid.timesteps)
    few = run.scheduler["lower_order_final"] and count < FEW_STEPS
    found: list[Tensor] = []
    for index in range(run.begin, count):
        start, end = run.level_node(index), run.level_node(index + 1)
        found = [*found[-2:], estimate(run, denoise, x, start, of_noise=True)]  # the newest last
        order = min(int(run.scheduler["solver_order"]), len(found))
        order = min(order, count - index) if few else order
        kappas = run.grid.kappas[index - order + 1 : index + 1]
        weights = adams_weights(kappas, run.grid.kappas[index + 1], torch.log)
        change = sum(weight * eps for weight, eps in zip(weights, found[-order:], strict=True))
        x = end.alpha * (x / start.alpha + change)
    return x
