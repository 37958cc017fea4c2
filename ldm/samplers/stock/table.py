"""diffusers' schedulers that visit entries of the table: DDIM, DDPM, PNDM, LCM.

They begin with n, and end at the level that `StockRun.level` gives for timesteps below 0. Written from the behaviour of
scheduling_{ddim,ddpm,pndm,lcm}.py, diffusers 0.42.
"""

from __future__ import annotations

import math

from torch import Tensor

from ldm.diffusion.nodes import Step, ddpm_mean, variance_range
from ldm.samplers.steps import Denoise, Generators, add_noise, noise_like
from ldm.samplers.stock.run import CLEAN, StockRun, eps_of


def stock_ddim(run: StockRun, denoise: Denoise, x: Tensor, generator: Generators, *, eta: float = 0.0) -> Tensor:
    """DDIM, whose steps are all N // steps long, so that a step need not end where the next begins."""
    stride = run.entries // run.steps
    for timestep in run.grid.timesteps[run.begin :]:
        start, end = run.node(timestep), run.level(timestep - stride)
        x0 = denoise(x, start.t)
        eps = eps_of(x0, x, start)
        variance = (end.sigma / start.sigma) ** 2 * (1 - (start.alpha / end.alpha) ** 2)
        up = eta * math.sqrt(max(0.0, variance))
        x = end.alpha * run.limited(x0) + math.sqrt(max(0.0, end.sigma**2 - up**2)) * eps
        x = add_noise(x, up, generator)
    return x


def stock_ddpm(run: StockRun, denoise: Denoise, x: Tensor, generator: Generators) -> Tensor:
    """DDPM over the grid's own steps; the larger variance is also added at the end."""
    timesteps = run.grid.timesteps
    for index, timestep in enumerate(timesteps[run.begin :], run.begin):
        end = run.node(timesteps[index + 1]) if index + 1 < len(timesteps) else CLEAN
        step = Step(run.node(timestep), end)
        x_weight, x0_weight = ddpm_mean(step)
        x0 = run.limited(denoise(x, step.start.t))
        small, large = variance_range(step)
        x = x_weight * x + x0_weight * x0
        if timestep > 0:
            variance = large if run.scheduler["variance_type"] == "fixed_large" else max(small, 1e-20)
            x = x + math.sqrt(variance) * noise_like(x, generator)
    return x


def stock_lcm(run: StockRun, denoise: Denoise, x: Tensor, generator: Generators) -> Tensor:
    """LCM with its boundary condition: at timestep 0 the sample itself is the answer. Luo et al. 2023, section 4."""
    timesteps, scaling, deviation = run.grid.timesteps, float(run.scheduler["timestep_scaling"]), 0.5
    for index, timestep in enumerate(timesteps[run.begin :], run.begin):
        start, scaled = run.node(timestep), timestep * scaling
        total = scaled**2 + deviation**2
        x0 = run.limited(denoise(x, start.t))
        x = scaled / math.sqrt(total) * x0 + deviation**2 / total * x
        if index < len(timesteps) - 1:
            end = run.node(timesteps[index + 1])
            x = end.alpha * x + end.sigma * noise_like(x, generator)
    return x


def pndm_evaluations(run: StockRun) -> list[float]:
    """List the timesteps that PNDM evaluates at, in order. Raises ValueError if its first steps do not fit."""
    timesteps, half = run.grid.timesteps, run.entries // run.steps // 2
    if run.scheduler["skip_prk_steps"]:
        return [timesteps[0], *timesteps[1:2], *timesteps[1:]]
    if len(timesteps) < 4:
        raise ValueError(f"steps is {run.steps}, expected at least 4 for a PNDM whose first three have four parts each")
    first, second, third, fourth = timesteps[:4]
    warmup = [first, second + half, second + half, second, second, third + half, third + half, third]
    return [*warmup, third, fourth + half, fourth + half, fourth, *timesteps[3:]]


def stock_pndm(run: StockRun, denoise: Denoise, x: Tensor, generator: Generators) -> Tensor:
    """PNDM: Runge-Kutta steps first, unless they are skipped, then the mean of the last four outputs.

    Where they are skipped, the first step is taken twice, the second time with the mean of the outputs at both ends.
    Outputs are eps or v as they come, and become a step by Liu et al. 2022 (arXiv 2202.09778), eq. 9.
    """
    evaluations, stride = pndm_evaluations(run), run.entries // run.steps
    warmup = 0 if run.scheduler["skip_prk_steps"] else 12
    outputs: list[Tensor] = []
    total, origin = x, x
    for count, timestep in enumerate(evaluations[run.begin :]):
        node = run.node(timestep)
        output = run.output(denoise(x, node.t), x, node)
        if count < warmup:
            if count % 4 == 0:
                outputs, origin, total = [*outputs, output], x, output / 6
            elif count % 4 < 3:
                total = total + output / 3
            start = evaluations[count // 4 * 4]
            end = timestep - (0 if count % 2 else stride // 2)
            x = _transfer(run, origin, start, end, total + output / 6 if count % 4 == 3 else output)
            continue
        again = warmup == 0 and count == 1
        outputs = outputs if again else [*outputs[-3:], output]
        mean = (output + outputs[-1]) / 2 if again else adams_mean(outputs)
        origin, x = (x, x) if count == 0 else (origin, origin if again else x)
        x = _transfer(run, x, timestep + stride * again, timestep - stride * (not again), mean)
    return x


def adams_mean(outputs: list[Tensor]) -> Tensor:
    """The Adams-Bashforth mean of the outputs so far, the newest last. Liu et al. 2022, eq. 12 and below."""
    match outputs:
        case [first]:
            return first
        case [before, last]:
            return (3 * last - before) / 2
        case [oldest, before, last]:
            return (23 * last - 16 * before + 5 * oldest) / 12
        case _:
            oldest, third, before, last = outputs
            return (55 * last - 59 * before + 37 * third - 9 * oldest) / 24


def _transfer(run: StockRun, x: Tensor, timestep: float, following: float, output: Tensor) -> Tensor:
    """Step from a timestep to the following. v becomes eps at this x and timestep, whatever it was evaluated at."""
    start, end = run.level(timestep), run.level(following)
    eps = start.alpha * output + start.sigma * x if run.prediction == "v" else output
    return end.alpha / start.alpha * x + (end.sigma - end.alpha / start.alpha * start.sigma) * eps
