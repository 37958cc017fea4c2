"""DDIM inversion: from an image to the noise from which DDIM generates it."""

from torch import Tensor

from ldm.diffusion.nodes import grid_steps
from ldm.diffusion.paths import PathConfig
from ldm.samplers.steps import Denoise, ddim_step


def invert(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, *, iterations: int = 20) -> Tensor:
    """Find the x at times[0] from which `ddim` over the same times reaches this x at times[-1]. B x ...

    The inverse of a DDIM step is x_t = alpha x0_hat + (sigma / sigma') (x' - alpha' x0_hat), where x0_hat depends on
    the unknown x_t: it is solved by fixed-point iteration, starting from x'. One iteration is the usual inversion (Song
    et al. 2020, appendix F), which is approximate; more converge if the denoiser is smooth enough for the step.

    times must end above 0: at t = 0 there is no noise to follow back. Raises ValueError otherwise.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected 1 or more")
    if times[-1] <= 0:
        raise ValueError("times end at 0, where no noise is left to follow back: leave out the last one")
    for start, end in reversed(list(grid_steps(path, times))):
        found = x
        for _ in range(iterations):
            found = ddim_step(x, denoise(found, start.t), end, start)
        x = found
    return x
