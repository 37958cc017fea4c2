"""The course of a drawing: its times, the path they are on, and the sampler that follows them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from ldm.diffusion import PathConfig
from ldm.diffusion.table_paths import BetaTablePath
from ldm.inference.img2img import Canvas, Start, remaining, restored
from ldm.inference.request import DrawRequest, steps_left
from ldm.model.components import ModelComponents
from ldm.model.facts import STOCK
from ldm.model.latent_diffusion import LatentDiffusion
from ldm.samplers import SAMPLERS, Denoise, Generators, Variance, time_grid
from ldm.samplers.stock.plan import StockPlan, stock_plan


@dataclass(frozen=True, kw_only=True)
class Course:
    """A checked request's steps. The model's path is the one that its times belong to."""

    request: DrawRequest
    model: LatentDiffusion
    times: Tensor
    stock: StockPlan | None = None

    @property
    def one_by_one(self) -> bool:
        """Whether a picture would depend on its batch."""
        return self.stock is None and SAMPLERS[self.request.sampler].one_by_one

    def draw(self, denoise: Denoise, begun: Start, generators: Generators, variance: Variance) -> Tensor:
        """Follow `denoise` from the start to latents."""
        if self.stock is None:
            function = SAMPLERS[self.request.sampler].with_options(eta=self.request.options.eta, variance=variance)
            return function(denoise, begun.x, self.model.path, self.times, generators)
        return restored(self.stock.function(denoise, begun.x, self.model.path, self.times, generators), begun)


def course_of(request: DrawRequest, parts: ModelComponents, drawn_on: Canvas | None) -> Course:
    """Plan a checked request's steps: those of the sampler and grid that it names, or those of the model's folder."""
    model, options = parts.model, request.options
    if request.sampler != STOCK:
        times = time_grid(model.path, request.steps, options.grid)
        return Course(
            request=request, model=model, times=times if drawn_on is None else remaining(times, drawn_on.strength)
        )
    assert parts.scheduler is not None and isinstance(model.path, BetaTablePath)
    skipped = 0 if drawn_on is None else request.steps - steps_left(request.steps, drawn_on.strength)
    plan = stock_plan(parts.scheduler, model.path, model.prediction, request.steps, skipped=skipped, eta=options.eta)
    # It has what networks and image-to-image need of a path, at its own times only.
    own = replace(model, path=cast(PathConfig, plan.path))
    return Course(request=request, model=own, times=plan.times, stock=plan)
