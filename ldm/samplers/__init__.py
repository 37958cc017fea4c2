"""Samplers: integrate from noise to data along a path, given only a function denoise(x_t, t) -> x0_hat.

A sampler is a pure function `sampler(denoise, x, path, times, generator) -> x`:

    denoise     x_t (B x ...) and t (0-d, one of times) to x0_hat of x_t's shape; wrap it to show progress
    x           B x ..., a sample at times[0]; not modified
    times       1-D, on the CPU, strictly decreasing within [0, 1], usually to 0; preferably float64
    generator   one CPU generator per image, so that an image does not depend on its batch; only
                stochastic samplers draw from it
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor

from ldm.diffusion.paths import PathConfig
from ldm.files.messages import unknown_name
from ldm.samplers.k_diffusion import dpm_adaptive, dpm_fast, restart
from ldm.samplers.linear_multistep import deis, lms, plms, pndm
from ldm.samplers.multistep import (
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2m_sde_heun,
    dpmpp_3m_sde,
    dpmpp_3m_sde_exact,
    unipc,
)  # fmt: skip
from ldm.samplers.names import SUFFIXES, spellings, split_name, squeezed
from ldm.samplers.single_step import (
    ddim,
    ddpm,
    ddpm_large,
    ddpm_learned,
    dpm2,
    dpm2_ancestral,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    heun,
    invert,
    lcm,
)  # fmt: skip
from ldm.samplers.steps import Denoise, Generators, Variance, noise_like
from ldm.samplers.stock.scheduler import StockScheduler
from ldm.samplers.time_grids import SCHEDULE_TYPES, TIME_GRIDS, grid_named, time_grid

__all__ = [
    "SAMPLERS", "TIME_GRIDS", "Denoise", "Generators", "Sampler", "SamplerFunction", "Variance", "invert",
    "evaluations_of", "noise_like", "sampler_and_grid", "sampler_named", "time_grid",
]  # fmt: skip


SamplerFunction = Callable[[Denoise, Tensor, PathConfig, Tensor, Generators], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    function: Callable[..., Tensor]  # a SamplerFunction, some with additional keywords
    order: int  # error ~ (step size)^order: of the image or, if stochastic, of mean and variance
    stochastic: bool
    label: str  # the name in A1111 and in the metadata of images
    evaluations: int = 1  # of the denoiser per step; one for a step from alpha = 0 or to sigma = 0
    more_at_first: int = 0  # additional evaluations in the first steps
    eta: float | None = None  # its default; None: it has no eta
    learned_variance: bool = False  # whether it needs a network that has learned one
    note: str = ""  # what sets it apart from others of similar names, for the list in --help
    other_names: tuple[str, ...] = ()  # in other programs
    automatic: str = "normal"  # the time grid that A1111 uses with it if none is named
    own_grid: str | None = None  # the only time grid that it can follow
    one_by_one: bool = False  # whether a picture would depend on its batch

    def check(self, *, learned: bool) -> None:
        """Raise ValueError if it needs a learned variance and the network has none."""
        if self.learned_variance and not learned:
            raise ValueError(f"sampler {self.label} needs a network that has learned its variance: use ddpm")

    def with_eta(self, eta: float | None) -> SamplerFunction:
        """Return the function with this fraction of noise, 0 to 1; None: its default. Raises ValueError if it has no
        eta."""
        if eta is None:
            return cast(SamplerFunction, self.function)
        if self.eta is None:
            raise ValueError(f"sampler {self.label} has no eta: leave it out, or use {', '.join(_WITH_ETA)}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is {eta}, expected 0 (no noise) to 1 (DDPM's)")
        return partial(cast(Any, self.function), eta=eta)

    def with_options(self, *, eta: float | None = None, variance: Variance) -> SamplerFunction:
        """Return with_eta's function, with the network's variance if it needs that."""
        function = self.with_eta(eta)
        return partial(cast(Any, function), variance=variance) if self.learned_variance else function


# DDIM, Euler's method on x / alpha (k-diffusion) and Euler's method for rectified flow are the same
# update between given nodes. Users look for either name, so both are here, and both call `ddim`; so does Euler's
# method with fresh noise at each step, which is DDIM with eta = 1.
# fmt: off
SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(function=ddpm, order=1, stochastic=True, label="DDPM"),
    "ddpm_large": Sampler(function=ddpm_large, order=1, stochastic=True, label="DDPM large"),
    "ddpm_learned": Sampler(
        function=ddpm_learned, order=1, stochastic=True, label="DDPM learned", learned_variance=True
    ),
    "ddim": Sampler(function=ddim, order=1, stochastic=False, label="DDIM", eta=0.0, automatic="ddim_uniform"),
    "euler": Sampler(function=ddim, order=1, stochastic=False, label="Euler"),
    "euler_ancestral": Sampler(function=partial(ddim, eta=1.0), order=1, stochastic=True, label="Euler a", eta=1.0),
    "heun": Sampler(function=heun, order=2, stochastic=False, label="Heun", evaluations=2),
    "dpm2": Sampler(function=dpm2, order=2, stochastic=False, label="DPM2", evaluations=2, automatic="karras"),
    "dpm2_ancestral": Sampler(
        function=dpm2_ancestral, order=2, stochastic=True, label="DPM2 a", evaluations=2, eta=1.0, automatic="karras"
    ),
    "dpm_fast": Sampler(function=dpm_fast, order=2, stochastic=True, label="DPM fast", eta=1.0, own_grid="exponential"),
    "dpm_adaptive": Sampler(
        function=dpm_adaptive, order=0, stochastic=True, label="DPM adaptive", eta=1.0, own_grid="exponential",
        one_by_one=True, other_names=("DPM ad",), note="with as many steps as it needs",
    ),
    "dpmpp_2s_ancestral": Sampler(
        function=dpmpp_2s_ancestral, order=2, stochastic=True, label="DPM++ 2S a", evaluations=2, eta=1.0,
        automatic="karras",
    ),
    "dpmpp_sde": Sampler(
        function=dpmpp_sde, order=1, stochastic=True, label="DPM++ SDE", evaluations=2, eta=1.0, automatic="karras"
    ),
    "dpmpp_2m": Sampler(
        function=dpmpp_2m, order=2, stochastic=False, label="DPM++ 2M", automatic="karras",
        other_names=("dpmsolver++",),
    ),
    "dpmpp_2m_sde": Sampler(
        function=dpmpp_2m_sde, order=2, stochastic=True, label="DPM++ 2M SDE", automatic="exponential"
    ),
    "dpmpp_2m_sde_heun": Sampler(
        function=dpmpp_2m_sde_heun, order=2, stochastic=True, label="DPM++ 2M SDE Heun", automatic="exponential"
    ),
    "dpmpp_3m_sde": Sampler(
        function=dpmpp_3m_sde, order=2, stochastic=True, label="DPM++ 3M SDE", automatic="exponential",
        note="with half of the last term, as in k-diffusion",
    ),
    "dpmpp_3m_sde_exact": Sampler(
        function=dpmpp_3m_sde_exact, order=2, stochastic=True, label="DPM++ 3M SDE exact", automatic="exponential",
        note="with all of it",
    ),
    # The last step of these two is of order 1.
    "unipc": Sampler(
        function=partial(unipc, order=3, lower_at_end=True, linear=True), order=2, stochastic=False, label="UniPC",
        automatic="sgm_uniform", other_names=("UniPC bh1",), note="A1111's: bh1, order 3, reduced at the end",
    ),
    "unipc_bh2": Sampler(
        function=partial(unipc, order=3, lower_at_end=True), order=2, stochastic=False, label="UniPC bh2",
        automatic="sgm_uniform", note="the same with bh2, as in ComfyUI",
    ),
    "unipc_2": Sampler(
        function=partial(unipc, order=2), order=3, stochastic=False, label="UniPC 2", automatic="sgm_uniform",
        note="bh2, order 2: diffusers' default",
    ),
    "unipc_3": Sampler(
        function=partial(unipc, order=3), order=4, stochastic=False, label="UniPC 3", automatic="sgm_uniform",
        note="bh2, order 3 to the end",
    ),
    "lms": Sampler(function=lms, order=4, stochastic=False, label="LMS"),
    "plms": Sampler(function=plms, order=2, stochastic=False, label="PLMS", more_at_first=1, automatic="ddim_uniform"),
    "pndm": Sampler(function=pndm, order=2, stochastic=False, label="PNDM", more_at_first=9),
    "deis": Sampler(
        function=deis, order=3, stochastic=False, label="DEIS", note="of order 3 in log sigma, unlike ComfyUI's"
    ),
    "restart": Sampler(function=restart, order=2, stochastic=True, label="Restart", evaluations=2, own_grid="karras"),
    "lcm": Sampler(function=lcm, order=0, stochastic=True, label="LCM"),
}
# fmt: on
_WITH_ETA = [name for name, sampler in SAMPLERS.items() if sampler.eta is not None]


def evaluations_of(name: str, scheduler: StockScheduler | None) -> int:
    """Return the evaluations in a step of a sampler or, if it is not in SAMPLERS, of a model's own scheduler."""
    if name in SAMPLERS:
        return SAMPLERS[name].evaluations
    return 1 if scheduler is None else scheduler.evaluations


def sampler_named(name: str) -> str:
    """Return the key of SAMPLERS for a name that sampler_and_grid takes, whatever time grid it also names."""
    return _split(name)[0]


def sampler_and_grid(name: str, grid: str | None = None) -> tuple[str, str | None]:
    """Return the key of SAMPLERS and the time grid that are meant by a sampler's name and a time grid's.

    name: a key or label, in any case, or its name in A1111, ComfyUI or InvokeAI, where a grid may follow, as in "DPM++
    2M Karras". grid: a name that grid_named takes, "automatic" for the one that A1111 uses with the sampler, or times;
    None: none is named. Warns of a grid that the sampler does not follow. Raises ValueError for unknown names, which
    suggests the nearest, and for two different grids.
    """
    key, of_name = _split(name)
    sampler = SAMPLERS[key]
    if grid is not None and squeezed(grid) == "automatic":
        grid = of_name or sampler.own_grid or sampler.automatic
    elif grid is not None and "," not in grid:
        grid = grid_named(grid)
    if of_name and grid and TIME_GRIDS.get(grid) is not TIME_GRIDS[of_name]:
        raise ValueError(f"sampler {name!r} names the time grid {of_name}, but the time grid is {grid}: leave out one")
    grid = of_name or grid
    if sampler.own_grid and grid and TIME_GRIDS.get(grid) is not TIME_GRIDS[sampler.own_grid]:
        warnings.warn(f"sampler {sampler.label} chooses its own times: the time grid {grid} is ignored", stacklevel=2)
    return key, sampler.own_grid or grid


def _split(name: str) -> tuple[str, str | None]:
    samplers = spellings({key: (sampler.label, *sampler.other_names) for key, sampler in SAMPLERS.items()})
    grids = {squeezed(key): key for key in TIME_GRIDS} | SCHEDULE_TYPES | SUFFIXES
    found = split_name(name, samplers, grids | {"automatic": "automatic"})
    if found is None:
        written = {known.lower(): key for key, sampler in SAMPLERS.items() for known in (key, sampler.label)}
        raise unknown_name("sampler", name, written)
    key, grid = found
    return key, SAMPLERS[key].own_grid or SAMPLERS[key].automatic if grid == "automatic" else grid
