"""Samplers: integrate from noise to data along a path, given only a function denoise(x_t, t) -> x0_hat.

A sampler is a pure function `sampler(denoise, x, path, times, generator) -> x`:

    denoise     x_t (B x ...) and t (0-d, one of times) to x0_hat of x_t's shape; wrap it to show progress
    x           B x ..., a sample at times[0]; not modified
    times       1-D, on the CPU, strictly decreasing within [0, 1], usually to 0; preferably float64
    generator   one CPU generator per image, so that an image does not depend on its batch; only
                stochastic samplers draw from it
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from torch import Tensor

from ldm.diffusion.paths import PathConfig
from ldm.files.messages import unknown_name
from ldm.samplers.linear_multistep import deis, lms, plms, pndm
from ldm.samplers.multistep import dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, unipc
from ldm.samplers.single_step import ddim, ddpm, ddpm_large, ddpm_learned, dpm2, dpmpp_2s_ancestral, heun, invert, lcm
from ldm.samplers.steps import Denoise, Generators, Variance, noise_like
from ldm.samplers.time_grids import TIME_GRIDS, time_grid

__all__ = [
    "SAMPLERS", "TIME_GRIDS", "Denoise", "Generators", "Sampler", "SamplerFunction", "Variance", "invert",
    "noise_like", "sampler_named", "time_grid",
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
SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(function=ddpm, order=1, stochastic=True, label="DDPM"),
    "ddpm_large": Sampler(function=ddpm_large, order=1, stochastic=True, label="DDPM large"),
    "ddpm_learned": Sampler(
        function=ddpm_learned, order=1, stochastic=True, label="DDPM learned", learned_variance=True
    ),
    "ddim": Sampler(function=ddim, order=1, stochastic=False, label="DDIM", eta=0.0),
    "euler": Sampler(function=ddim, order=1, stochastic=False, label="Euler"),
    "euler_ancestral": Sampler(function=partial(ddim, eta=1.0), order=1, stochastic=True, label="Euler a", eta=1.0),
    "heun": Sampler(function=heun, order=2, stochastic=False, label="Heun", evaluations=2),
    "dpm2": Sampler(function=dpm2, order=2, stochastic=False, label="DPM2", evaluations=2),
    "dpmpp_2s_ancestral": Sampler(
        function=dpmpp_2s_ancestral, order=2, stochastic=True, label="DPM++ 2S a", evaluations=2, eta=1.0
    ),
    "dpmpp_2m": Sampler(function=dpmpp_2m, order=2, stochastic=False, label="DPM++ 2M"),
    "dpmpp_2m_sde": Sampler(function=dpmpp_2m_sde, order=2, stochastic=True, label="DPM++ 2M SDE"),
    "dpmpp_3m_sde": Sampler(function=dpmpp_3m_sde, order=2, stochastic=True, label="DPM++ 3M SDE"),
    "unipc_2": Sampler(function=partial(unipc, order=2), order=3, stochastic=False, label="UniPC 2"),
    "unipc_3": Sampler(function=partial(unipc, order=3), order=4, stochastic=False, label="UniPC"),
    "lms": Sampler(function=lms, order=4, stochastic=False, label="LMS"),
    "plms": Sampler(function=plms, order=2, stochastic=False, label="PLMS", more_at_first=1),
    "pndm": Sampler(function=pndm, order=2, stochastic=False, label="PNDM", more_at_first=9),
    "deis": Sampler(function=deis, order=3, stochastic=False, label="DEIS"),
    "lcm": Sampler(function=lcm, order=0, stochastic=True, label="LCM"),
}
_WITH_ETA = [name for name, sampler in SAMPLERS.items() if sampler.eta is not None]


def sampler_named(name: str) -> str:
    """Return the key of SAMPLERS for a key or label, in any case. Raises ValueError, which suggests the nearest."""
    names = {written.lower(): key for key, sampler in SAMPLERS.items() for written in (key, sampler.label)}
    if name.lower() in names:
        return names[name.lower()]
    raise unknown_name("sampler", name, names)
