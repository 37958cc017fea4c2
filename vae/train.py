"""Train a KL autoencoder on captioned shards.

    deepspeed vae/train.py --config configs/emoji64_vae.yaml [section.key=value ...]

Plain `python` and torchrun start it too. At the end the latents' mean and standard deviation are measured over the
training set, and the averaged weights are written to RUN/vae, which ldm/train.py reads.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from ldm.commands import run_command, training_arguments

if TYPE_CHECKING:
    from PIL import Image

    from data.loader import CaptionedImages
    from ldm.config import VAETrainConfig
    from ldm.engine import Engine
    from ldm.run import Run

GRID_PICTURES, GRID_COLUMNS = 32, 16


def main(args: Namespace) -> None:
    import torch
    from torch import Tensor

    from data.loader import Batch, CaptionedImages, held_out
    from ldm.config import VAETrainConfig, dump, load_config
    from ldm.diffusion import sample_randomness
    from ldm.engine import Engine, start_process
    from ldm.loop import train
    from ldm.run import Run
    from vae import AutoencoderKL
    from vae.losses import VAELoss

    config = load_config(VAETrainConfig, args.config, args.overrides)
    world = start_process()
    run = Run(config.run, is_main=world.is_main, config_text=dump(config))
    images = CaptionedImages(config.data, seed=config.run.seed, rank=world.rank, ranks=world.ranks)
    validation = held_out(config.validation, image_size=config.data.image_size)
    torch.manual_seed(config.run.seed)
    network = AutoencoderKL(config.vae)
    total, batch_size = config.run.steps, config.data.batch_size
    engine = Engine(network, world, config=config.engine, optim=config.optim, batch_size=batch_size, total_steps=total)
    loss_function = VAELoss(config.loss).to(world.device)
    side = config.data.image_size // config.vae.factor

    def losses(batch: Batch) -> dict[str, Tensor]:
        # Convolutions follow their input into this layout, in which they run faster; the weights stay as they are,
        # because DeepSpeed broadcasts and flattens only contiguous ones.
        pixels = batch.pixels.to(world.device).contiguous(memory_format=torch.channels_last)
        noise = sample_randomness(config.run.seed, batch.positions, (config.vae.latent_channels, side, side)).eps
        reconstruction, posterior = engine(pixels, noise.to(world.device))
        return loss_function(reconstruction, pixels, posterior)

    train(engine, run, images, losses, sample=lambda step: validate(config, engine, run, validation, step))
    if engine.step == config.run.steps:
        finish(config, engine, run, images)


def validate(config: VAETrainConfig, engine: Engine, run: Run, validation: CaptionedImages, step: int) -> None:
    """PSNR of the averaged weights over the validation set, and a sheet of pictures above their reconstructions."""
    import torch

    from ldm.grids import save_image, sheet, to_images
    from vae import AutoencoderKL
    from vae.measure import psnr

    weights = engine.averaged_weights()
    if not run.is_main:
        return
    vae = AutoencoderKL(config.vae).to(engine.world.device)
    vae.load_state_dict(weights)
    decibels: list[torch.Tensor] = []
    shown: list[torch.Tensor] = []
    with torch.no_grad():
        for batch in validation.once(config.validation.batch_size):
            pixels = batch.pixels.to(engine.world.device)
            reconstruction = vae.decode_z(vae.posterior(pixels).mean)
            decibels.append(psnr(reconstruction, pixels))
            if not shown:
                shown = [pixels[:GRID_PICTURES], reconstruction[:GRID_PICTURES]]
    mean = torch.cat(decibels).mean().item()
    run.tell(f"step {step}: validation PSNR {mean:.2f} dB over {sum(map(len, decibels))} pictures")
    run.record(step=step, validation_psnr=mean)
    originals, reconstructions = (to_images(part) for part in shown)
    columns = min(GRID_COLUMNS, len(originals))
    cells: list[Image.Image] = []
    for start in range(0, len(originals) - columns + 1, columns):
        cells += originals[start : start + columns] + reconstructions[start : start + columns]
    save_image(sheet(cells, columns=columns), run.sample_path(step))


def finish(config: VAETrainConfig, engine: Engine, run: Run, images: CaptionedImages) -> None:
    """Measure the latents over the training set and write the averaged weights, once training is complete."""
    from ldm.interop.vae import save_vae
    from vae import AutoencoderKL
    from vae.measure import latent_statistics

    weights = engine.averaged_weights()
    if not run.is_main:
        return
    vae = AutoencoderKL(config.vae).to(engine.world.device)
    vae.load_state_dict(weights)
    pixels = (batch.pixels.to(engine.world.device) for batch in images.once(config.data.batch_size))
    mean, std = latent_statistics(vae, pixels)
    vae.config = dataclasses.replace(config.vae, latent_mean=mean, latent_std=std)
    save_vae(vae, config.run.path / "vae")
    run.tell(f"latents: mean {[round(m, 3) for m in mean]}, standard deviation {[round(s, 3) for s in std]}")
    run.tell(f"wrote {config.run.path / 'vae'}")


if __name__ == "__main__":
    sys.exit(run_command(main, training_arguments(__doc__ or "")))
