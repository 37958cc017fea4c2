"""diffusers' UniPC: a predictor of order p from earlier steps, and a corrector with the estimate at the step's end.

Zhao et al. 2023 (arXiv 2302.04867), algorithms 5 and 6, B(h) = h (bh1) or e^h - 1 (bh2). Written from the behaviour of
scheduling_unipc_multistep.py, diffusers 0.42.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ldm.diffusion.nodes import Node
from ldm.samplers.steps import Denoise, Generators
from ldm.samplers.stock.run import StockRun
from ldm.samplers.stock.solvers import estimate


def stock_unipc(run: StockRun, denoise: Denoise, x: Tensor, generator: Generators) -> Tensor:
    """Step with predictor and corrector; each step's correction uses the evaluation that the next needs anyway."""
    scheduler, count = run.scheduler, len(run.grid.timesteps)
    found: list[Tensor] = []  # the newest first
    nodes: list[Node] = []
    order, before = 0, x
    for index in range(run.begin, count):
        node = run.level_node(index)
        estimated = estimate(run, denoise, x, node, of_noise=not scheduler["predict_x0"])
        if found and index - 1 not in scheduler["disable_corrector"]:
            x = unipc_step(run, before, nodes, found, node, order=order, at_end=estimated)
        found, nodes = [estimated, *found[:2]], [node, *nodes[:2]]
        order = min(int(scheduler["solver_order"]), len(found))
        order = min(order, count - index) if scheduler["lower_order_final"] else order
        before = x
        x = unipc_step(run, x, nodes, found, run.level_node(index + 1), order=order)
    return x


def unipc_step(
    run: StockRun,
    x: Tensor,
    nodes: Sequence[Node],
    found: Sequence[Tensor],
    end: Node,
    *,
    order: int,
    at_end: Tensor | None = None,
) -> Tensor:
    """Predict the sample at the end of a step, or correct it with the estimate there."""
    start, of_data = nodes[0], bool(run.scheduler["predict_x0"])
    h = end.half_log_snr - start.half_log_snr
    if h == 0:
        return x
    z = -h if of_data else h
    scale, kept = (end.alpha, end.sigma / start.sigma) if of_data else (end.sigma, end.alpha / start.alpha)
    result = kept * x - scale * math.expm1(z) * found[0]
    if order == 1 and at_end is None:
        return result
    ratios = [(node.half_log_snr - start.half_log_snr) / h for node in nodes[1:order]]
    slopes = [(value - found[0]) / ratio for value, ratio in zip(found[1:order], ratios, strict=True)]
    size = z if run.scheduler["solver_type"] == "bh1" else math.expm1(z)
    if at_end is not None:
        slopes, ratios = [*slopes, at_end - found[0]], [*ratios, 1.0]
    weights = [0.5] if len(slopes) == 1 and order < 3 else moments(ratios, z, size)
    return result - scale * size * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))


def moments(ratios: Sequence[float], z: float, size: float) -> list[float]:
    """Solve sum_k w_k r_k^(i - 1) = i! phi_(i + 1)(z) z / B for the weights of the slopes. Zhao et al. 2023, eq. 10."""
    sides: list[float] = []
    phi, factorial = math.expm1(z) / z - 1, 1
    for i in range(1, len(ratios) + 1):
        sides.append(phi * factorial / size)
        factorial *= i + 1
        phi = phi / z - 1 / factorial
    r = torch.tensor(ratios, dtype=torch.float64)
    matrix = torch.stack([r**power for power in range(len(ratios))])
    return cast(Any, torch.linalg).solve(matrix, torch.tensor(sides, dtype=torch.float64)).tolist()
