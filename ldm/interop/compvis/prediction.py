"""What a network of Stable Diffusion predicts, where its files do not say it.

Whether Stable Diffusion 2 predicts eps or v: the user's choice; then the file or the YAML next to it; then eps for
Stable Diffusion 1; otherwise a test of the network, because both have the same shapes. Given pure noise at the last
timestep, a network that predicts eps returns its input. One that predicts v = alpha eps - sigma x0 returns about -x0,
an image of its own, because alpha is nearly zero there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ldm.denoisers import UNet, UNetConfig
from ldm.diffusion import Prediction
from ldm.model.components import LoadedDenoiser
from ldm.model.conditioner import Conditioner

LAST_TIMESTEP = 999
ASKED_SIDE = 16  # of the latents: 1/16 of the work of the native 64 x 64
LEAST_CORRELATION = 0.5  # of the output with the noise: near 1 for an eps network, near 0 for a v network


def find_prediction(
    wanted: Prediction | None, stated: Prediction | None, loaded: LoadedDenoiser, conditioner: Conditioner
) -> tuple[Prediction, tuple[str, ...]]:
    """Return what the network predicts, with a remark on how that was determined."""
    if wanted is not None:
        return wanted, ("prediction as requested",)
    unet, config, *_ = loaded
    if stated is not None or not isinstance(config, UNetConfig) or not config.use_linear_projection:
        return stated or "eps", ()
    assert isinstance(unet, UNet)
    seen = noise_in_answer(unet, conditioner)
    remark = f"prediction found by a test (noise in its output: {seen:.2f}; --prediction sets it)"
    return "eps" if seen > LEAST_CORRELATION else "v", (remark,)


@torch.no_grad()
def noise_in_answer(unet: UNet, conditioner: Conditioner) -> float:
    """Return the correlation of the network's output with its input noise, for the empty prompt."""
    parameter = next(unet.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, unet.in_channels, ASKED_SIDE, ASKED_SIDE, generator=generator).to(parameter)
    noise, further = x[:, : unet.latent_channels], None
    if unet.concat_channels:  # for inpainting: everything masked, and an empty image
        further = torch.zeros_like(x[:, unet.latent_channels :])
        further[:, 0] = 1
    condition = conditioner([""])._replace(concat=further).to(parameter.dtype)
    t = torch.full((1,), float(LAST_TIMESTEP), device=parameter.device)
    answer = unet(noise, t, condition).prediction
    return F.cosine_similarity(answer.float().flatten(), noise.float().flatten(), dim=0).item()
