"""Train a KL autoencoder on captioned shards.

    deepspeed vae/train.py --config configs/emoji64_vae.yaml [section.key=value ...]

Plain `python` and torchrun start it too. At the end the latents' mean and standard deviation are measured over the
training set, and the averaged weights are written to RUN/vae, which ldm/train.py reads.
"""

from __future__ import annotations

import dataclasses
import sys
from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING

from ldm.cli.parser import training_arguments
from ldm.cli.run import run_command

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.training.configs import VAETrainConfig
    from ldm.training.loop import Session
    from vae import AutoencoderKL

GRID_PICTURES, GRID_COLUMNS = 32, 16


def main(args: Namespace) -> None:
    import torch

    from data.loader import Batch
    from ldm.diffusion import sample_randomness
    from ldm.training.checkpoints.rng_state import seed_generators
    from ldm.training.configs import VAETrainConfig
    from ldm.training.loop import open_session, train
    from vae import AutoencoderKL
    from vae.losses import VAELoss

    session = open_session(VAETrainConfig, args)
    config, world = session.config, session.world
    seed_generators(config.run.seed)
    engine = session.engine(AutoencoderKL(config.vae))
    loss_function = VAELoss(config.loss).to(world.device)
    side = config.data.image_size // config.vae.factor

    def losses(batch: Batch) -> dict[str, Tensor]:
        # Convolutions follow their input into this layout, in which they run faster; the weights stay as they are,
        # because DeepSpeed broadcasts and flattens only contiguous ones.
        pixels = batch.pixels.to(world.device).contiguous(memory_format=torch.channels_last)
        noise = sample_randomness(config.run.seed, batch.positions, (config.vae.latent_channels, side, side)).eps
        reconstruction, posterior = engine(pixels, noise.to(world.device))
        return loss_function(reconstruction, pixels, posterior)

    train(session, engine, losses, partial(validate, session), finish=partial(finish, session))


def averaged_network(session: Session[VAETrainConfig], weights: dict[str, Tensor]) -> AutoencoderKL:
    from vae import AutoencoderKL

    vae = AutoencoderKL(session.config.vae).to(session.world.device)
    vae.load_state_dict(weights)
    return vae


def validate(session: Session[VAETrainConfig], step: int, weights: dict[str, Tensor]) -> None:
    """PSNR of averaged weights over the validation set, and a sheet of pictures above their reconstructions."""
    import torch

    from ldm.inference.contact_sheet import save_image, sheet, to_images
    from vae.measure import psnr

    config, run = session.config, session.run
    vae = averaged_network(session, weights)
    decibels: list[torch.Tensor] = []
    shown: list[torch.Tensor] = []
    with torch.no_grad():
        for batch in session.validation.once(config.validation.batch_size):
            pixels = batch.pixels.to(session.world.device)
            reconstruction = vae.decode_z(vae.posterior(pixels).mean)
            decibels.append(psnr(reconstruction, pixels))
            if not shown:
                shown = [pixels[:GRID_PICTURES], reconstruction[:GRID_PICTURES]]
    mean = torch.cat(decibels).mean().item()
    run.tell(f"step {step}: validation PSNR {mean:.2f} dB over {sum(map(len, decibels))} pictures")
    originals, reconstructions = (to_images(part) for part in shown)
    columns = min(GRID_COLUMNS, len(originals))
    cells: list[Image.Image] = []
    for start in range(0, len(originals) - columns + 1, columns):
        cells += originals[start : start + columns] + reconstructions[start : start + columns]
    save_image(sheet(cells, columns=columns), run.sample_path(step))
    run.record(step=step, validation_psnr=mean)


def finish(session: Session[VAETrainConfig], weights: dict[str, Tensor]) -> None:
    """Measure the latents over the training set and write the averaged weights, once training is complete."""
    from ldm.files.atomic import atomic_folder
    from ldm.interop.diffusers_layout.vae import save_vae
    from vae.measure import latent_statistics

    config, run = session.config, session.run
    vae = averaged_network(session, weights)
    run.tell(f"measuring the latents of {len(session.images)} pictures")
    batches = session.images.once(config.data.batch_size)
    mean, std = latent_statistics(vae, (batch.pixels.to(session.world.device) for batch in batches))
    vae.config = dataclasses.replace(config.vae, latent_mean=mean, latent_std=std)
    with atomic_folder(config.run.path / "vae") as folder:
        save_vae(vae, folder)
    run.tell(f"latents: mean {[round(m, 3) for m in mean]}, standard deviation {[round(s, 3) for s in std]}")
    run.tell(f"wrote {config.run.path / 'vae'}")


if __name__ == "__main__":
    sys.exit(run_command(main, training_arguments(__doc__ or "")))
