"""The time grids of diffusers' schedulers: whole or fractional timesteps, and the noise levels at them.

Levels are kappa = sigma / alpha, which diffusers calls sigma. Rounding follows numpy's arange and linspace, because one
timestep more or less is another picture. Source of the rules: set_timesteps of each class, diffusers 0.42.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.samplers.stock.scheduler import StockScheduler

# Classes whose grid of N steps is the first N of N + 1 timesteps, since their last step ends at the last one.
WITH_AN_END = {
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
}  # fmt: skip
ON_THE_TABLE = {"DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler"}  # visit only whole timesteps
_ROUND_KARRAS = WITH_AN_END | {"KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}


class StockTable(NamedTuple):
    """The levels of N entries, in float32 as in diffusers, where some timesteps depend on the last bit."""

    alphas: list[float]
    sigmas: list[float]
    kappas: list[float]  # sigma / alpha, rising
    logs: list[float]  # of kappa


@dataclass(frozen=True, kw_only=True)
class StockGrid:
    """Timesteps that the network gets, and a level more than there are of them: the last is where sampling ends."""

    timesteps: list[float]
    kappas: list[float]


def arange_down(start: float, step: float) -> list[float]:
    """Count from start down to 0, exclusive, as numpy.arange(start, 0, -step): by the difference of the first two."""
    difference = (start - step) - start
    return [start + i * difference for i in range(math.ceil((0 - start) / -step))]


def linspace(start: float, stop: float, count: int) -> list[float]:
    """Return `count` even numbers, as numpy.linspace: the last is exactly `stop`."""
    if count == 1:
        return [start]
    step = (stop - start) / (count - 1)
    return [*(i * step + start for i in range(count - 1)), stop]


def spaced(scheduler: StockScheduler, entries: int, steps: int, *, last: int | None = None) -> list[float]:
    """Return the timesteps of a table of N entries, falling; fractional where the class leaves them so.

    last: the entries below a limit of the SNR, for the classes that have one.
    """
    last, offset = entries if last is None else last, scheduler.get("steps_offset", 0)
    further = scheduler.kind in WITH_AN_END
    match scheduler.get("timestep_spacing", "linspace"):
        case "leading":
            ratio = last // (steps + further)
            return [float(i * ratio + offset) for i in range(steps - 1 + further, -1 + further, -1)]
        case "trailing":
            return [round(value) - 1.0 for value in arange_down(last, entries / steps)]
        case _:
            found = linspace(0, last - 1, steps + further)[::-1][:steps]
            rounded = further or scheduler.kind in ON_THE_TABLE
            return [float(round(value)) for value in found] if rounded else found


def lcm_timesteps(scheduler: StockScheduler, entries: int, steps: int) -> list[float]:
    """Return evenly chosen ones of the timesteps that the consistency model was distilled on."""
    original = int(scheduler["original_inference_steps"])
    if steps > original or original > entries:
        raise ValueError(f"steps is {steps}, expected at most {original}, the steps that this LCM was distilled on")
    trained = [i * (entries // original) - 1 for i in range(original, 0, -1)]
    return [float(trained[math.floor(place)]) for place in linspace(0, original, steps + 1)[:-1]]


def level_grid(scheduler: StockScheduler, table: StockTable, steps: int) -> StockGrid:
    """Return the grid of a class that steps in noise levels."""
    entries = table.kappas
    last = len(entries) - _clipped(scheduler, table)
    timesteps = spaced(scheduler, len(entries), steps, last=last)
    kappas = [interpolated(entries, timestep) for timestep in timesteps]
    if scheduler.get("interpolation_type") == "log_linear":
        kappas = [math.exp(level) for level in linspace(table.logs[-1], table.logs[0], steps + 1)]
    ends = (entries[-1], entries[0]) if scheduler.kind in WITH_AN_END else (kappas[0], kappas[-1])
    converted = converted_levels(scheduler, ends, steps)
    if converted is not None:
        kappas, timesteps = converted, [position_of(table, kappa) for kappa in converted]
        karras_rounds = scheduler.get("use_karras_sigmas") and scheduler.kind in _ROUND_KARRAS
        if karras_rounds or scheduler.get("use_lu_lambdas"):
            timesteps = [float(round(timestep)) for timestep in timesteps]
    if scheduler.kind in WITH_AN_END:
        timesteps = [float(int(timestep)) for timestep in timesteps]
    return StockGrid(timesteps=timesteps, kappas=[*kappas, _last_level(scheduler, entries, converted)])


def _clipped(scheduler: StockScheduler, table: StockTable) -> int:
    """Count the noisiest entries whose lambda = -log kappa is below lambda_min_clipped."""
    least = float(scheduler.get("lambda_min_clipped", -math.inf))
    return sum(-level < least for level in table.logs)


def _last_level(scheduler: StockScheduler, entries: Sequence[float], converted: Sequence[float] | None) -> float:
    kind = scheduler.kind
    ends_clean = kind not in WITH_AN_END and kind != "EulerDiscreteScheduler"
    if ends_clean or scheduler.get("final_sigmas_type") == "zero":
        return 0.0
    if converted is not None and kind in ("DEISMultistepScheduler", "UniPCMultistepScheduler"):
        return converted[-1]
    return entries[0]


def interpolated(entries: Sequence[float], timestep: float) -> float:
    """Interpolate kappa linearly in the timestep, within the table."""
    place = min(max(timestep, 0), len(entries) - 1)
    below = min(int(place), len(entries) - 2)
    return entries[below] + (place - below) * (entries[below + 1] - entries[below])


def position_of(table: StockTable, kappa: float) -> float:
    """Return the fractional timestep at which log kappa, linear between entries, has this value."""
    level = math.log(max(kappa, 1e-10))
    below = min(max(bisect_right(table.logs, level) - 1, 0), len(table.logs) - 2)
    low, high = table.logs[below : below + 2]
    fraction = min(max((level - low) / (high - low), 0), 1)
    return (1 - fraction) * below + fraction * (below + 1)


def converted_levels(scheduler: StockScheduler, ends: tuple[float, float], steps: int) -> list[float] | None:
    """Return the levels that are not those of the timesteps, if the scheduler has such. ends: the highest, the lowest.

    Karras et al. 2022 (arXiv 2206.00364), eq. 5; Lu et al. 2022 (arXiv 2206.00927), section 3.4; Lee et al. 2024 (arXiv
    2407.12173).
    """
    if scheduler.get("use_karras_sigmas"):
        # LMS has no limits of its own here.
        high, low = ends if scheduler.kind == "LMSDiscreteScheduler" else _limits(scheduler, ends)
        return [root**7 for root in linspace(high ** (1 / 7), low ** (1 / 7), steps)]
    if scheduler.get("use_lu_lambdas"):
        return [math.exp(value) for value in linspace(math.log(ends[0]), math.log(ends[1]), steps)]
    high, low = _limits(scheduler, ends)
    if scheduler.get("use_exponential_sigmas"):
        return [math.exp(value) for value in linspace(math.log(high), math.log(low), steps)]
    if scheduler.get("use_beta_sigmas"):
        fractions = torch.tensor([1 - value for value in linspace(0, 1, steps)], dtype=torch.float64)
        return [low + (high - low) * place.item() for place in beta_quantiles(fractions)]
    return None


def _limits(scheduler: StockScheduler, ends: tuple[float, float]) -> tuple[float, float]:
    high, low = scheduler.get("sigma_max"), scheduler.get("sigma_min")
    return (ends[0] if high is None else high), (ends[1] if low is None else low)


def beta_quantiles(fractions: Tensor, a: float = 0.6) -> Tensor:
    """Return the quantiles of the symmetric distribution Beta(a, a), float64, by bisection of its lower half.

    The integral of x^(a - 1) (1 - x)^(a - 1) is a series in x, which halves its terms at x <= 1/2.
    """
    terms = torch.arange(64, dtype=torch.float64)
    factors = torch.cat([torch.ones(1, dtype=torch.float64), ((terms[1:] - a) / terms[1:]).cumprod(0)]) / (a + terms)

    def mass(x: Tensor) -> Tensor:
        return x**a * (factors * x[:, None] ** terms).sum(1)

    wanted = torch.minimum(fractions, 1 - fractions) * 2 * mass(torch.full((1,), 0.5, dtype=torch.float64))
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, 0.5)
    for _ in range(80):
        middle = (low + high) / 2
        above = mass(middle) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.where(fractions <= 0.5, high, 1 - high)
