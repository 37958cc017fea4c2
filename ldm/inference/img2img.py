"""Draw from an initial image: image-to-image, and inpainting, where a mask selects what is repainted.

B batch, C latent channels, H x W pixels, h x w latents. White (1) in a mask is repainted, black (0) is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.pictures import normalized, over_white
from data.readers import to_pixels
from ldm.diffusion import PathConfig, noise_sample
from ldm.inference.masks import pasted, read_mask, remarks_on_mask
from ldm.inference.request import DrawRequest, steps_left
from ldm.model.latent_diffusion import LatentDiffusion
from ldm.samplers import Denoise, Generators
from vae.autoencoder import DiagonalGaussian


@dataclass(frozen=True, slots=True, kw_only=True)
class Canvas:
    """An initial image, as the autoencoder's input."""

    pixels: Tensor  # 1 x 3 x H x W in [-1, 1]
    mask: Tensor | None  # 1 x 1 x H x W of 0 and 1; None: everything may change
    strength: float  # fraction of the steps that are taken, above 0 to 1
    edge: int = 0  # pixels over which the repainted part blends into the kept one

    def paste(self, drawn: Tensor) -> Tensor:
        """Put the image's own pixels over drawn ones, B x 3 x H x W, where the mask keeps them."""
        return pasted(drawn, self.pixels, self.mask, self.edge)


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A sampler's input, and what it must keep."""

    x: Tensor  # B x C x h x w, at the first time's noise level
    concat: Tensor | None = None  # B x (1 + C) x h x w: an inpainting network's channels next to x_t
    clean: Tensor | None = None  # B x C x h x w: the image's latents, and the noise added to them
    noise: Tensor | None = None
    mask: Tensor | None = None  # 1 x 1 x h x w, for `keeping`
    is_noise: bool = False  # whether x is noise everywhere, even where the image is kept


def canvas(
    image: Image.Image, mask: Image.Image | None, strength: float, *, size: tuple[int, int], edge: int = 0
) -> Canvas:
    """Convert the image and the mask, of any mode, at height x width = size."""
    pixels = to_pixels(resized(over_white(normalized(image)), size))[None]
    chosen = None if mask is None else read_mask(normalized(mask), size)
    return Canvas(pixels=pixels, mask=chosen, strength=strength, edge=edge)


def canvas_of(request: DrawRequest) -> Canvas | None:
    """Convert a checked request's image and mask; None if it starts from noise."""
    if request.image is None:
        return None
    assert request.height is not None and request.width is not None and request.usual_strength is not None
    size, edge = (request.height, request.width), request.options.mask_edge
    return canvas(request.image, request.mask, request.usual_strength, size=size, edge=edge)


def remarks_on(request: DrawRequest, cell: int) -> list[str]:
    """List, a line each, why a checked request's mask cannot be followed as it is. cell: pixels a side of a latent."""
    if request.image is None or request.mask is None:
        return []
    assert request.height is not None and request.width is not None
    white = read_mask(request.mask, (request.height, request.width))
    return remarks_on_mask(request.mask, request.image, white, cell)


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize the image to height x width = size, unless it already has that size."""
    height, width = size
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def remaining(times: Tensor, strength: float) -> Tensor:
    """Return the grid's last steps. Raises ValueError if there are none."""
    steps = len(times) - 1
    return times[steps - steps_left(steps, strength) :]


@torch.no_grad()
def begin(
    model: LatentDiffusion, drawn_on: Canvas, generators: Generators, times: Tensor, *, for_inpainting: bool,
    stock: bool = False,
) -> Start:  # fmt: skip
    """Compute x = alpha z + sigma n at times[0], with z each picture's own sample of the posterior, and n its noise.

    for_inpainting: whether the network was trained with the mask and the masked image as additional inputs; any other
    needs `keeping`. With a mask and strength 1, x is only noise. Random numbers are drawn in diffusers' order; stock:
    also those of the masked image's latents where nothing uses them.
    """
    dtype, device = next(model.vae.parameters()).dtype, model.device
    size = tuple(side // model.vae.config.factor for side in drawn_on.pixels.shape[2:])

    def latents(pixels: Tensor) -> Tensor:
        found = model.vae.encode(pixels.to(device, dtype))
        posterior = DiagonalGaussian(found.mean.float(), found.logvar.float())
        return posterior.sample(model.noise(generators, size=size))  # B x C x h x w

    from_noise = drawn_on.mask is not None and drawn_on.strength == 1
    z = None if from_noise and for_inpainting else latents(drawn_on.pixels)
    noise = model.noise(generators, size=size)
    x = model.prior(noise, times) if from_noise or z is None else noise_sample(z, noise, model.path, times[0])
    if drawn_on.mask is None:
        return Start(x=x)
    mask = F.interpolate(drawn_on.mask, size=size).to(device)  # 1 x 1 x h x w
    if not for_inpainting:
        if stock:
            model.noise(generators, size=size)
        return Start(x=x, clean=z, noise=noise, mask=mask, is_noise=from_noise)
    masked = latents(drawn_on.pixels * (1 - drawn_on.mask))
    return Start(x=x, concat=torch.cat([mask.expand(len(masked), -1, -1, -1), masked], dim=1))


def restored(latents: Tensor, start: Start) -> Tensor:
    """Put the image's own latents where the mask keeps them: sampling may end at a level that still has noise."""
    if start.clean is None or start.mask is None:
        return latents
    return start.mask * latents + (1 - start.mask) * start.clean


def keeping(denoise: Denoise, start: Start, path: PathConfig, times: Tensor) -> Denoise:
    """Wrap denoise(x_t, t) to keep what the mask leaves black: x_t is alpha z + sigma n there, and x0_hat is z.

    A sampler then moves the kept part along alpha z + sigma n, as if x_t had been corrected after each step. If x is
    noise everywhere, x_t is not replaced at the first time.
    """
    clean, noise, mask = start.clean, start.noise, start.mask
    assert clean is not None and noise is not None and mask is not None

    def kept(x_t: Tensor, t: Tensor) -> Tensor:
        at_first = start.is_noise and t >= times[0]
        corrected = x_t if at_first else mask * x_t + (1 - mask) * noise_sample(clean, noise, path, t)
        return mask * denoise(corrected, t) + (1 - mask) * clean

    return kept
