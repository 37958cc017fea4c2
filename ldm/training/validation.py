"""How well a denoiser in training does: a loss that is comparable between runs, and drawings of fixed prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from data.loader import CaptionedImages
from ldm.diffusion import by_quantile, draw_times, sample_randomness
from ldm.inference.contact_sheet import save_image, sheet
from ldm.inference.pipeline import TextToImage
from ldm.training.latent_cache import LatentEncoder

if TYPE_CHECKING:
    from ldm.denoisers import Denoiser
    from ldm.model.latent_diffusion import LatentDiffusion
    from ldm.training.configs import PreviewConfig, TrainConfig

HELD_OUT_SEED = 1_000_003  # noise and times of the held-out loss, the same for every run and step


@torch.no_grad()
def held_out_losses(
    config: TrainConfig, model: LatentDiffusion, denoiser: Denoiser, validation: CaptionedImages, *, bf16: bool
) -> dict[str, float]:
    """The error's mean over the validation set, "held_out_loss", and over each quarter of the times.

    Noise and times are fixed, captions always given; where training draws times by importance, these are even.
    """
    found: list[torch.Tensor] = []
    objective, uniforms = config.model.objective, torch.empty(0)
    if objective.time_sampling == "importance":
        objective = replace(objective, time_sampling="uniform")
    seen = 0
    encode = LatentEncoder(model.vae, keep=False, bf16=bf16)
    for batch in validation.once(config.validation.batch_size):
        x0 = encode.moments(batch).mean
        positions = range(seen, seen + len(x0))
        seen += len(x0)
        random = sample_randomness(HELD_OUT_SEED, positions, x0.shape[1:])
        eps, t = random.eps.to(x0.device), draw_times(objective, model.path, random.time_uniforms)
        with torch.autocast(x0.device.type, dtype=torch.bfloat16, enabled=bf16):
            found.append(model.losses(denoiser, x0, eps, t, model.conditioner(batch.captions)).error)
        uniforms = torch.cat([uniforms, random.time_uniforms])
    errors = torch.cat(found)
    parts = {f"held_out_{name}": part for name, part in by_quantile(errors, uniforms).items() if len(part)}
    return {name: part.mean().item() for name, part in ({"held_out_loss": errors} | parts).items()}


def drawings(preview: PreviewConfig, pipe: TextToImage, path: Path) -> None:
    """A sheet of the preview's prompts, a row each, from the same noise at every step."""
    images = [
        image
        for prompt in preview.prompts
        for image in pipe(
            prompt, steps=preview.steps, scale=preview.scale, sampler=preview.sampler, seed=preview.seed,
            n=preview.pictures,
        )
    ]  # fmt: skip
    save_image(sheet(images, columns=preview.pictures, labels=preview.prompts), path)
