"""Compare a model as it was written with the one that it was written from, before the export takes its name."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ldm.interop.read_model import read_model
from ldm.model.components import ModelComponents

# The second has a "!", which is a padding token in Stable Diffusion 2; the third is longer than any text encoder reads.
PROMPTS = ("", "a red apple on a table, wow!", "one tall lighthouse above the fog, " * 20)
SIDE = 8  # of the latents
MIDDLE = 0.5  # time of the evaluation
# Largest difference, relative to the largest value, that rounding the weights may cause: ten times what was measured.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.25}


def check_written(parts: ModelComponents, path: Path, *, dtype: torch.dtype) -> None:
    """Read an export, and raise ValueError if it is another model than `parts`, which is in float32.

    Compared are the noise path, the prediction, the token ids of three prompts, the denoiser's estimate for each, and
    the pixels of one. dtype: of the weights in the file.
    """
    written = read_model(path, dtype=torch.float32)
    if problem := difference(parts, written, TOLERANCES[dtype]):
        raise ValueError(
            f"the export was read back, and is another model ({problem}): nothing was written; please report this, "
            "with the model's configuration files"
        )


def difference(parts: ModelComponents, other: ModelComponents, tolerance: float) -> str:
    """Describe the first difference between two models; "" if there is none."""
    ours, theirs = parts.model, other.model
    if (ours.path, ours.prediction, parts.sample_size) != (theirs.path, theirs.prediction, other.sample_size):
        return f"it predicts {theirs.prediction} on {theirs.path} for latents of {other.sample_size} a side"
    ids = [[tower.tokenizer(PROMPTS).tolist() for tower in own.conditioner.towers] for own in (ours, theirs)]
    if ids[0] != ids[1]:
        return "prompts have other token ids"
    for what, value, found in zip(("denoiser", "autoencoder"), answers(parts), answers(other), strict=True):
        off = relative_error(found, value)
        if not off <= tolerance:
            return f"the {what}'s output differs by {off:.2g}"
    return ""


def relative_error(found: Tensor, value: Tensor) -> float:
    """Return the largest difference over the largest value; infinity if they are not finite in the same places."""
    finite = value.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return math.inf
    found, value = found[finite], value[finite]
    return ((found - value).abs().max() / value.abs().max().clamp(min=1e-12)).item() if len(value) else 0.0


@torch.no_grad()
def answers(parts: ModelComponents) -> tuple[Tensor, Tensor]:
    """Compute x0_hat of noise for the three prompts, 3 x C x h x w, and the pixels of the first, 1 x 3 x H x W."""
    model, denoiser, stride = parts.model, parts.denoiser, parts.config.stride
    side = -(-SIDE // stride) * stride
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(PROMPTS), denoiser.in_channels, side, side, generator=generator)
    x, concat = noise.split([denoiser.latent_channels, denoiser.concat_channels], dim=1)
    condition = model.conditioner(PROMPTS)._replace(concat=concat if denoiser.concat_channels else None)
    (time,) = model.path.snap(torch.tensor([MIDDLE], dtype=torch.float64))
    x0 = model.denoise_with(denoiser, condition)(x, time)
    return x0, model.vae.decode(x0[:1])
