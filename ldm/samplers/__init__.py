"""Samplers: from noise to data along a path, given only a function denoise(x_t, t) -> x0_hat.

A sampler is a pure function `sampler(denoise, x, path, times, generator) -> x`:

    denoise     x_t (B x ...) and t (0-d, one of times) to x0_hat of x_t's shape; wrap it to show progress
    x           B x ..., a sample at times[0]; left as it is
    times       1-D, on the CPU, strictly falling within [0, 1], usually to 0; best float64
    generator   one CPU generator for each image, so that a picture does not depend on its batch; only
                stochastic samplers draw from it
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from ldm.samplers.grids import TIME_GRIDS, time_grid
from ldm.samplers.inversion import invert
from ldm.samplers.multistep import deis, dpmpp_2m, dpmpp_2m_sde, dpmpp_3m_sde, lms, unipc_2, unipc_3
from ldm.samplers.single_step import (
    ddim,
    ddpm,
    ddpm_posterior,
    dpm2,
    dpmpp_2s_ancestral,
    euler_ancestral,
    heun,
    lcm,
)
from ldm.samplers.steps import Denoise, Generators, Node, Step, noise_like

if TYPE_CHECKING:
    from ldm.diffusion import PathConfig

__all__ = [
    "SAMPLERS",
    "TIME_GRIDS",
    "Denoise",
    "Generators",
    "Node",
    "Sampler",
    "Step",
    "ddpm_posterior",
    "invert",
    "noise_like",
    "time_grid",
]


class SamplerFunction(Protocol):
    def __call__(
        self, denoise: Denoise, x: Tensor, path: "PathConfig", times: Tensor, generator: Generators
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Sampler:
    function: SamplerFunction
    order: int  # error ~ (step size)^order: of the picture, or where stochastic of mean and variance
    stochastic: bool
    label: str  # the name in A1111 and in the metadata of its pictures
    evaluations: int = 1  # of the denoiser in a step, but for the first and the last


# DDIM, Euler's method on x / alpha (k-diffusion) and Euler's method for rectified flow are one and the
# same update between given nodes. Users look for either name, so both are here, and both are `ddim`.
SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(function=ddpm, order=1, stochastic=True, label="DDPM"),
    "ddim": Sampler(function=ddim, order=1, stochastic=False, label="DDIM"),
    "euler": Sampler(function=ddim, order=1, stochastic=False, label="Euler"),
    "euler_ancestral": Sampler(function=euler_ancestral, order=1, stochastic=True, label="Euler a"),
    "heun": Sampler(function=heun, order=2, stochastic=False, label="Heun", evaluations=2),
    "dpm2": Sampler(function=dpm2, order=2, stochastic=False, label="DPM2", evaluations=2),
    "dpmpp_2s_ancestral": Sampler(
        function=dpmpp_2s_ancestral, order=2, stochastic=True, label="DPM++ 2S a", evaluations=2
    ),
    "dpmpp_2m": Sampler(function=dpmpp_2m, order=2, stochastic=False, label="DPM++ 2M"),
    "dpmpp_2m_sde": Sampler(function=dpmpp_2m_sde, order=2, stochastic=True, label="DPM++ 2M SDE"),
    "dpmpp_3m_sde": Sampler(function=dpmpp_3m_sde, order=2, stochastic=True, label="DPM++ 3M SDE"),
    "unipc_2": Sampler(function=unipc_2, order=3, stochastic=False, label="UniPC 2"),
    "unipc_3": Sampler(function=unipc_3, order=4, stochastic=False, label="UniPC"),
    "lms": Sampler(function=lms, order=4, stochastic=False, label="LMS"),
    "deis": Sampler(function=deis, order=3, stochastic=False, label="DEIS"),
    "lcm": Sampler(function=lcm, order=0, stochastic=True, label="LCM"),
}
