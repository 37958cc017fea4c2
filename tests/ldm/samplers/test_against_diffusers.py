"""Samplers against diffusers' schedulers on a fixed random network, timesteps and all."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from helpers.analytic import generators
from torch import Tensor

from ldm.diffusion.paths import PathConfig, ScaledLinearBetaPath
from ldm.diffusion.predictions import to_x0
from ldm.samplers import SAMPLERS, noise_like, time_grid


def linear_eps_model() -> Callable[[Tensor, Tensor], Tensor]:
    """A fixed random network: eps linear in x, with a gain that depends on the timestep."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) / 4

    def eps(x: Tensor, timestep: Tensor) -> Tensor:
        return (x.flatten(1) @ weight).reshape(x.shape) * torch.cos(timestep / 300) * 0.5 + 0.3 * x

    return eps


def our_picture(name: str, x: Tensor, path: PathConfig, times: Tensor, seeds: Sequence[int] = (0, 1)) -> Tensor:
    eps = linear_eps_model()

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        return to_x0("eps", eps(x_t, path.timesteps(t).float()), x_t, path, t)

    return SAMPLERS[name].function(denoise, x, path, times, generators(*seeds))


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers, numpy 2
@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc", "unipc_bh2", "unipc_2", "plms"])
def test_deterministic_samplers_against_diffusers(name):
    unipc = partial(UniPCMultistepScheduler, **SD_BETAS, timestep_spacing="trailing")
    schedulers = {
        "unipc": unipc(solver_order=3, solver_type="bh1", final_sigmas_type="sigma_min"),  # to 0 it is NaN there
        "unipc_bh2": unipc(solver_order=3, solver_type="bh2"),
        "unipc_2": unipc(),
        "plms": PNDMScheduler(**SD_BETAS, skip_prk_steps=True, set_alpha_to_one=True, timestep_spacing="trailing"),
        "ddim": DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"),
        "dpmpp_2m": DPMSolverMultistepScheduler(
            **SD_BETAS,
            algorithm_type="dpmsolver++",
            solver_order=2,
            solver_type="midpoint",
            final_sigmas_type="zero",
            timestep_spacing="trailing",
        ),
    }
    scheduler, path, eps = schedulers[name], ScaledLinearBetaPath(), linear_eps_model()
    scheduler.set_timesteps(20)
    times = time_grid(path, 20)
    assert torch.equal(path.timesteps(times[:-1]).long(), scheduler.timesteps.unique_consecutive())
    times[-1] = 1e-3 if name == "unipc" else 0.0
    x = theirs = noise_like(torch.empty(2, 1, 4, 4), generators(5, 6))
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(eps(theirs, timestep), timestep, theirs, return_dict=False)[0]
    ours = our_picture(name, x, path, times)
    assert theirs.abs().max() > 0.5
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_ddpm_against_diffusers():
    scheduler, path, eps = (
        DDPMScheduler(**SD_BETAS, clip_sample=False, variance_type="fixed_small", timestep_spacing="trailing"),
        ScaledLinearBetaPath(),
        linear_eps_model(),
    )
    scheduler.set_timesteps(20)
    x = theirs = noise_like(torch.empty(1, 1, 4, 4), generators(5))
    (generator,) = generators(9)
    for timestep in scheduler.timesteps:
        theirs = scheduler.step(eps(theirs, timestep), int(timestep), theirs, generator=generator, return_dict=False)[0]
    ours = our_picture("ddpm", x, path, time_grid(path, 20), [9])
    assert theirs.abs().max() > 0.5
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
