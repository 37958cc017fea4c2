"""From what a model's folder states to steps: grid, start, method and end of a drawing as diffusers draws it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.nodes import Node, floats
from ldm.diffusion.predictions import Prediction
from ldm.diffusion.table_paths import BetaTablePath, LinearBetaPath, ScaledLinearBetaPath, zero_terminal_alphas
from ldm.samplers.steps import Denoise, Generators
from ldm.samplers.stock.grids import ON_THE_TABLE, WITH_AN_END, StockGrid, StockTable, lcm_timesteps, level_grid, spaced
from ldm.samplers.stock.levels import (
    stock_dpm2,
    stock_dpm2_ancestral,
    stock_euler,
    stock_euler_ancestral,
    stock_heun,
    stock_lms,
)
from ldm.samplers.stock.path import StockPath
from ldm.samplers.stock.run import Method, StockRun
from ldm.samplers.stock.scheduler import StockScheduler
from ldm.samplers.stock.solvers import stock_deis, stock_dpm_multistep, stock_dpm_singlestep
from ldm.samplers.stock.table import pndm_evaluations, stock_ddim, stock_ddpm, stock_lcm, stock_pndm
from ldm.samplers.stock.unipc import stock_unipc

METHODS: dict[str, Method] = {
    "DDIMScheduler": stock_ddim,
    "DDPMScheduler": stock_ddpm,
    "PNDMScheduler": stock_pndm,
    "LCMScheduler": stock_lcm,
    "LMSDiscreteScheduler": stock_lms,
    "EulerDiscreteScheduler": stock_euler,
    "EulerAncestralDiscreteScheduler": stock_euler_ancestral,
    "HeunDiscreteScheduler": stock_heun,
    "KDPM2DiscreteScheduler": stock_dpm2,
    "KDPM2AncestralDiscreteScheduler": stock_dpm2_ancestral,
    "DPMSolverMultistepScheduler": stock_dpm_multistep,
    "DPMSolverSinglestepScheduler": stock_dpm_singlestep,
    "DEISMultistepScheduler": stock_deis,
    "UniPCMultistepScheduler": stock_unipc,
}
TWO_EVALUATIONS = {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}
SMALLEST_PRODUCT = 2.0**-24  # alpha^2 of a last level without data, in the classes that step in levels


@dataclass(frozen=True, kw_only=True)
class StockPlan:
    """How to draw: `function` is a sampler on `path`; `times` are the keys of the steps, the first where it starts."""

    path: StockPath
    times: Tensor
    run: StockRun
    eta: float | None

    def function(self, denoise: Denoise, x: Tensor, path: Any, times: Tensor, generator: Generators) -> Tensor:
        """Draw: a SamplerFunction, whose path and times are the plan's own."""
        method = METHODS[self.run.scheduler.kind]
        if self.eta is not None:
            method = partial(stock_ddim, eta=self.eta)
        return method(self.run, denoise, x, generator)


def stock_plan(
    scheduler: StockScheduler,
    path: BetaTablePath,
    prediction: Prediction,
    steps: int,
    *,
    skipped: int = 0,
    eta: float | None = None,
) -> StockPlan:
    """Plan a drawing. skipped: steps that an initial image leaves out. eta: DDIM's.

    Raises ValueError, naming the value, if the scheduler cannot take so many steps.
    """
    table = table_of(scheduler, path)
    entries = len(table.alphas)
    if steps > entries:
        raise ValueError(f"steps is {steps}, more than the {entries} timesteps of {scheduler.kind}: use fewer")
    grid = grid_of(scheduler, table, steps)
    own = StockPath(entries, sigma_data=0.0 if begins_without_data(scheduler) else 1.0)
    begin = skipped * (2 if scheduler.kind in TWO_EVALUATIONS else 1)
    run = StockRun(
        scheduler=scheduler, prediction=prediction, path=own, table=table, grid=grid, steps=steps, begin=begin
    )
    keys = [node.t.item() for node in step_nodes(run, skipped)]
    return StockPlan(path=own, times=torch.tensor([*keys, 0.0], dtype=torch.float64), run=run, eta=eta)


def table_of(scheduler: StockScheduler, path: BetaTablePath) -> StockTable:
    """Return the table as this class computes it, in float32."""
    rescaled = bool(scheduler.get("rescale_betas_zero_snr"))
    products = (1 - float32_betas(path)).cumprod(0)
    if rescaled:
        alphas = zero_terminal_alphas(products.sqrt()) ** 2
        products = torch.cat([alphas[:1], alphas[1:] / alphas[:-1]]).cumprod(0)
        if scheduler.kind not in ON_THE_TABLE:
            products[-1] = SMALLEST_PRODUCT
    kappas, exact = ((1 - products) / products).sqrt(), products.double()
    return StockTable(*(floats(values) for values in (exact.sqrt(), (1 - exact).sqrt(), kappas, kappas.log())))


def float32_betas(path: BetaTablePath) -> Tensor:
    """Return the betas of a path before any rescaling, rounded as diffusers rounds them."""
    count = path.num_train_timesteps
    match path:
        case LinearBetaPath():
            return torch.linspace(path.beta_start, path.beta_end, count)
        case ScaledLinearBetaPath():
            return torch.linspace(path.beta_start**0.5, path.beta_end**0.5, count) ** 2
        case _:
            return path.betas().float()


def grid_of(scheduler: StockScheduler, table: StockTable, steps: int) -> StockGrid:
    """Return the grid of this many steps. Raises ValueError for a grid that leaves the table."""
    entries = len(table.alphas)
    if scheduler.kind == "LCMScheduler":
        return StockGrid(timesteps=lcm_timesteps(scheduler, entries, steps), kappas=[])
    if scheduler.kind in ON_THE_TABLE:
        return StockGrid(timesteps=spaced(scheduler, entries, steps), kappas=[])
    return level_grid(scheduler, table, steps)


def begins_without_data(scheduler: StockScheduler) -> bool:
    """Tell whether sampling begins with sigma n, where others begin with n."""
    after_k_diffusion = scheduler.kind not in ON_THE_TABLE | WITH_AN_END
    return after_k_diffusion and scheduler["timestep_spacing"] != "leading"


def step_nodes(run: StockRun, skipped: int) -> list[Node]:
    """Return the nodes of the steps that are taken, the first where sampling starts."""
    if run.scheduler.kind == "PNDMScheduler":
        evaluated = pndm_evaluations(run)[skipped:]
        ordered = sorted({*evaluated[:1], *(t for t in run.grid.timesteps if t < evaluated[0])}, reverse=True)
        return [run.node(timestep) for timestep in ordered]
    if run.scheduler.kind in ON_THE_TABLE:
        return [run.node(timestep) for timestep in run.grid.timesteps[skipped:]]
    return [run.level_node(index) for index in range(skipped, len(run.grid.timesteps))]
