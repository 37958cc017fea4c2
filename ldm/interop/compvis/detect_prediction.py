"""Whether a Stable Diffusion 2 predicts eps or v, where its file does not say: the two have the same shapes.

The rule: what the user says; else what the file, or the YAML beside it, says; else eps for Stable Diffusion 1; else the
network is asked. Shown pure noise at the last timestep, one that predicts eps answers with what it sees. One that
predicts v = alpha eps - sigma x0 answers with about -x0, a picture of its own making, for alpha is nearly zero there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ldm.denoisers import UNet, UNetConfig
from ldm.diffusion import Prediction
from ldm.model.conditioner import Conditioner

LAST_TIMESTEP = 999
ASKED_SIDE = 16  # latents: 1/16 of the work of the native 64 x 64
LEAST_CORRELATION = 0.5  # of an eps network's answer with the noise; its own is near 1, a v network's near 0


class Found(NamedTuple):
    prediction: Prediction
    remarks: tuple[str, ...] = ()


def find_prediction(
    wanted: Prediction | None,
    told: Prediction | None,
    *,
    unet: UNet,
    config: UNetConfig,
    conditioner: Conditioner,
) -> Found:
    """What the network predicts, and how that is known."""
    if wanted is not None:
        return Found(wanted, ("prediction as asked for",))
    if told is not None:
        return Found(told)
    if not config.use_linear_projection:
        return Found("eps")
    seen = noise_in_answer(unet, conditioner)
    found: Prediction = "eps" if seen > LEAST_CORRELATION else "v"
    return Found(found, (f"prediction found by asking it (noise in its answer: {seen:.2f}; --prediction sets it)",))


@torch.no_grad()
def noise_in_answer(unet: UNet, conditioner: Conditioner) -> float:
    """Correlation of the answer with the noise that it was shown, for the empty prompt."""
    parameter = next(unet.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, unet.in_channels, ASKED_SIDE, ASKED_SIDE, generator=generator).to(parameter)
    noise, further = x[:, : unet.latent_channels], None
    if unet.concat_channels:  # for inpainting: everything masked, and nothing to be seen of the picture
        further = torch.zeros_like(x[:, unet.latent_channels :])
        further[:, 0] = 1
    condition = conditioner([""])._replace(concat=further).to(parameter.dtype)
    t = torch.full((1,), float(LAST_TIMESTEP), device=parameter.device)
    answer = unet(noise, t, condition).prediction
    return F.cosine_similarity(answer.float().flatten(), noise.float().flatten(), dim=0).item()
