"""From a picture to the noise that DDIM would draw it from."""

from typing import TYPE_CHECKING

from torch import Tensor

from ldm.diffusion.nodes import grid_steps
from ldm.samplers.steps import Denoise, ddim_step

if TYPE_CHECKING:
    from ldm.diffusion import PathConfig


def invert(denoise: Denoise, x: Tensor, path: "PathConfig", times: Tensor, *, iterations: int = 20) -> Tensor:
    """The x at times[0] from which `ddim` over the same times comes to this x at times[-1]. B x ...

    A step of DDIM is undone by x_t = alpha x0_hat + (sigma / sigma') (x' - alpha' x0_hat), with x0_hat of the x_t that
    is looked for: so it is looked for by repetition, from x' on. One iteration is the usual inversion (Song et al.
    2020, appendix F), which comes back only nearly; more converge where the denoiser is smooth enough for the step.

    times must end above 0: at t = 0 no noise is left that could be followed back. Raises ValueError otherwise.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, expected 1 or more")
    if times[-1] <= 0:
        raise ValueError("times end at 0, where no noise is left to follow: leave the last one out")
    for start, end in reversed(list(grid_steps(path, times))):
        found = x
        for _ in range(iterations):
            found = ddim_step(x, denoise(found, start.t), end, start)
        x = found
    return x
