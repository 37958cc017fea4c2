"""Samplers of k-diffusion and A1111 that choose their own times: DPM fast, DPM adaptive and Restart.

Of the given times they take the range and, except for DPM adaptive, the number of steps. As there, the variable is
y = x / alpha, whose noise level is kappa = sigma / alpha = e^-lambda. A step from alpha = 0 is a DDIM step.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.nodes import Node, Step, grid_steps
from ldm.diffusion.paths import PathConfig
from ldm.samplers.single_step import heun_step
from ldm.samplers.steps import Denoise, Generators, add_noise, ancestral, ddim_step, node_of

Eps = Callable[[Tensor, float], Tensor]  # the noise in y at a lambda
Solve = Callable[[Eps, Tensor, float, float, int], Tensor]  # y at the second lambda, and the number of steps for it


def dpm_fast(
    denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators, *, eta: float = 1.0
) -> Tensor:
    """DPM-Solver-fast: as many evaluations as steps, three to a step that is even in lambda, the last ones fewer.

    k-diffusion's sample_dpm_fast, after Lu et al. 2022 (arXiv 2206.00927), section 3.4; eta is 1 in A1111 and 0 in
    ComfyUI. As there, it ends at the last level above 0, whose noise stays in the picture.
    """

    def solve(eps_at: Eps, y: Tensor, start: float, end: float, steps: int) -> Tensor:
        groups = steps // 3 + 1
        orders = [3] * (groups - 2) + [2, 1] if steps % 3 == 0 else [3] * (groups - 1) + [steps % 3]
        ends = [*(start + (end - start) * i / groups for i in range(groups)), end]
        for order, (begin, goal) in zip(orders, pairwise(ends), strict=True):
            down, up = lowered(begin, goal, end, eta)
            eps = eps_at(y, begin)
            if order == 1:
                y = first_order(y, begin, down, eps)
            elif order == 2:
                y, _ = second_order(eps_at, y, begin, down, eps, fraction=1 / 2)
            else:
                _, eps_third = second_order(eps_at, y, begin, down, eps, fraction=1 / 3)
                y = third_order(eps_at, y, begin, down, eps, eps_third)
            y = add_noise(y, up, generator)
        return y

    return between_ends(denoise, x, path, times, solve)


def dpm_adaptive(
    denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators, *, eta: float = 1.0
) -> Tensor:
    """DPM-Solver-23: steps of three evaluations, as long as the second and the third order agree, however many.

    k-diffusion's sample_dpm_adaptive with its tolerances, after Lu et al. 2022, appendix C; eta as in dpm_fast, and so
    is the end. The steps depend on all of x, so give one picture at a time. Each step waits for the device.
    """

    def solve(eps_at: Eps, y: Tensor, start: float, end: float, steps: int) -> Tensor:
        sizes = StepSizes(order=1.5 if eta else 3)
        before = y
        while start < end - 1e-5:
            goal = min(end, start + sizes.h)
            down, up = lowered(start, goal, end, eta)
            eps = eps_at(y, start)
            low, eps_third = second_order(eps_at, y, start, down, eps, fraction=1 / 3)
            high = third_order(eps_at, y, start, down, eps, eps_third)
            allowed = (0.05 * torch.maximum(low.abs(), before.abs())).clamp(min=0.0078)
            error = ((low - high) / allowed).square().mean().sqrt().item()
            if sizes.accept(error):
                before, y, start = low, add_noise(high, up, generator), goal
            elif not math.isfinite(error):
                return high  # as from any other sampler, what is not finite comes out
        return y

    return between_ends(denoise, x, path, times, solve)


def between_ends(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, solve: Solve) -> Tensor:
    """Take x from the first time at which alpha > 0 to the last at which sigma > 0, and return it at the last time."""
    steps = list(grid_steps(path, times))
    if steps[0].start.alpha == 0:
        x = ddim_step(x, denoise(x, steps[0].start.t), *steps[0])
        steps = steps[1:]
    if not steps:
        return x
    if steps[0].end.sigma == 0:  # no range is left
        return ddim_step(x, denoise(x, steps[0].start.t), *steps[0])

    def eps_at(y: Tensor, half_log_snr: float) -> Tensor:
        node = node_of(path, half_log_snr, times)
        return (y - denoise(node.alpha * y, node.t)) / math.exp(-half_log_snr)

    first, last = steps[0].start, steps[-1].end if steps[-1].end.sigma > 0 else steps[-1].start
    y = solve(eps_at, x / first.alpha, first.half_log_snr, last.half_log_snr, len(steps))
    return steps[-1].end.alpha * y


def lowered(start: float, goal: float, end: float, eta: float) -> tuple[float, float]:
    """Return the lambda to step to so that noise of the returned deviation leads to goal; it is at most end."""
    down, up = ancestral(Step(at_level(start), at_level(goal)), eta)
    if up == 0:
        return goal, 0.0
    reached = min(end, down.half_log_snr)
    return reached, math.sqrt(max(0.0, math.exp(-2 * goal) - math.exp(-2 * reached)))


def at_level(half_log_snr: float) -> Node:
    """Return the node of y: its alpha is 1."""
    return Node(torch.tensor(math.nan), 1.0, math.exp(-half_log_snr))


def first_order(y: Tensor, start: float, end: float, eps: Tensor) -> Tensor:
    """y' = y - kappa' (e^h - 1) eps: a DDIM step. Lu et al. 2022 (arXiv 2206.00927), eq. 3.7."""
    return y - math.exp(-end) * math.expm1(end - start) * eps


def second_order(
    eps_at: Eps, y: Tensor, start: float, end: float, eps: Tensor, *, fraction: float
) -> tuple[Tensor, Tensor]:
    """Return y' and eps at this fraction of the step. Lu et al. 2022, algorithm 4."""
    h = end - start
    eps_within = eps_at(first_order(y, start, start + fraction * h, eps), start + fraction * h)
    change = math.exp(-end) * math.expm1(h) / (2 * fraction) * (eps_within - eps)
    return first_order(y, start, end, eps) - change, eps_within


def third_order(eps_at: Eps, y: Tensor, start: float, end: float, eps: Tensor, eps_third: Tensor) -> Tensor:
    """Return y' from eps at the start and after a third of the step. Lu et al. 2022, algorithm 5."""
    h = end - start
    two_thirds = start + 2 / 3 * h
    factor = math.exp(-two_thirds) * 2 * (math.expm1(2 / 3 * h) / (2 / 3 * h) - 1)
    eps_two_thirds = eps_at(first_order(y, start, two_thirds, eps) - factor * (eps_third - eps), two_thirds)
    change = math.exp(-end) * 3 / 2 * (math.expm1(h) / h - 1) * (eps_two_thirds - eps)
    return first_order(y, start, end, eps) - change


class StepSizes:
    """The step in lambda, from the error of each: k-diffusion's PIDStepSizeController, of which only I is not 0."""

    def __init__(self, *, order: float) -> None:
        self.h, self.order = 0.05, order

    def accept(self, error: float) -> bool:
        """Change h by the error over what is allowed, and return whether the step may be taken. NaN may not."""
        factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / self.order) - 1)
        self.h *= factor
        return factor >= 0.81


# ------------------------------------------------------------------------------------------------------- Restart


def restart(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """Heun's method that goes back: noise is added from kappa near 0.1 up to near 2, and removed again.

    The steps are A1111's (modules/sd_samplers_extra.py, restart_sampler); with fewer than twenty there is no restart.
    Xu et al. 2023 (arXiv 2306.14878), algorithm 1.
    """
    steps = list(grid_steps(path, times))
    if steps[0].start.alpha == 0:
        x = ddim_step(x, denoise(x, steps[0].start.t), *steps[0])
        steps = steps[1:]
    if len(steps) < 20:
        runs = [steps]
    else:
        kappas = [step.start.sigma / step.start.alpha for step in steps] + [steps[-1].end.sigma / steps[-1].end.alpha]
        runs = [list(map(Step._make, pairwise(level_nodes(path, run, times)))) for run in restart_runs(kappas)]
    reached: Node | None = None
    for run in runs:
        if reached is not None:
            start = run[0].start
            added = (start.sigma / start.alpha) ** 2 - (reached.sigma / reached.alpha) ** 2
            x = add_noise(start.alpha / reached.alpha * x, start.alpha * math.sqrt(added), generator)
        for step in run:
            x = heun_step(denoise, x, step)
            reached = step.end
    return x


def level_nodes(path: PathConfig, kappas: Sequence[float], times: Tensor) -> list[Node]:
    """Return the nodes at these sigma / alpha, of which the last may be 0."""
    zero = Node(torch.zeros_like(times[0]), 1.0, 0.0)
    return [node_of(path, -math.log(kappa), times) if kappa > 0 else zero for kappa in kappas]


def restart_runs(kappas: Sequence[float]) -> list[list[float]]:
    """Return the falling runs of kappa in place of a grid of twenty steps or more, with as many steps in all."""
    steps, ends_at_zero = len(kappas) - 1, kappas[-1] == 0
    again, times_again = (steps // 4, 2) if steps >= 36 else (9, 1)
    kept = steps - again * times_again
    if ends_at_zero:
        levels = [*karras_levels(kappas[0], kappas[-2], kept), 0.0]
    else:
        levels = karras_levels(kappas[0], kappas[-1], kept + 1)
    low, high = (min(range(len(levels)), key=lambda i: abs(levels[i] - near)) for near in (0.1, 2.0))
    if high >= low:
        return [levels]
    repeated = karras_levels(levels[high], levels[low], again + 1)
    return [levels[: low + 1], *[repeated] * (times_again - 1), repeated + levels[low + 1 :]]


def karras_levels(high: float, low: float, count: int) -> list[float]:
    """Return levels from high to low, even in the seventh root. Karras et al. 2022 (arXiv 2206.00364), eq. 5."""
    first, last = high ** (1 / 7), low ** (1 / 7)
    return [(first + (last - first) * i / (count - 1)) ** 7 for i in range(count)]
