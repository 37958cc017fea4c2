"""How well a denoiser in training does: a loss that is comparable between runs, and drawings of fixed prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from data.loader import CaptionedImages
from ldm.diffusion import diffusion_loss, draw_times, noise_sample, sample_randomness, target
from ldm.grids import save_image, sheet, to_images
from ldm.latent_diffusion import LatentDiffusion, guided
from ldm.latents import LatentEncoder

if TYPE_CHECKING:
    from ldm.config import TrainConfig

HELD_OUT_SEED = 1_000_003  # noise and times of the held-out loss, the same for every run and step


@torch.no_grad()
def held_out_loss(
    config: TrainConfig, model: LatentDiffusion, denoiser: nn.Module, validation: CaptionedImages, *, bf16: bool
) -> float:
    """The training objective's mean over the validation set, with fixed noise and times, captions always given."""
    path, objective = config.model.path, config.model.objective
    found: list[torch.Tensor] = []
    seen = 0
    encode = LatentEncoder(model.vae, keep=False, bf16=bf16)
    for batch in validation.once(config.validation.batch_size):
        x0 = encode.moments(batch).mean
        positions = range(seen, seen + len(x0))
        seen += len(x0)
        random = sample_randomness(HELD_OUT_SEED, positions, x0.shape[1:])
        eps, t = random.eps.to(x0.device), draw_times(objective, path, random.time_uniforms)
        text = model.condition(batch.captions)
        timesteps = path.timesteps(t).to(x0.device)
        with torch.autocast(x0.device.type, dtype=torch.bfloat16, enabled=bf16):
            output = denoiser(noise_sample(x0, eps, path, t), timesteps, text.context, text.mask, text.pooled)
        found.append(diffusion_loss(output, target(objective.prediction, x0, eps, path, t)))
    return torch.cat(found).mean().item()


def drawings(config: TrainConfig, model: LatentDiffusion, denoiser: nn.Module, path: Path) -> None:
    """A sheet of the preview's prompts, a row each, from the same noise at every step."""
    preview = config.preview
    side = config.data.image_size // model.vae.config.factor
    prompts = [prompt for prompt in preview.prompts for _ in range(preview.pictures)]
    seeds = [preview.seed + i for _ in preview.prompts for i in range(preview.pictures)]
    with torch.no_grad():
        denoise = guided(model, denoiser, prompts, [""] * len(prompts), preview.scale)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        latents = model.sample(denoise, generators, size=(side, side), sampler=preview.sampler, steps=preview.steps)
        save_image(sheet(to_images(model.decode(latents)), columns=preview.pictures, labels=preview.prompts), path)
