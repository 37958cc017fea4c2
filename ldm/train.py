"""Train a text-to-image denoiser on captioned shards.

    deepspeed ldm/train.py --config configs/emoji64_dit.yaml [section.key=value ...]

Plain `python` and torchrun start it too. Every run.sample_every steps the averaged weights are exported to RUN/model,
which txt2img.py draws with: `python txt2img.py --ckpt runs/NAME/model --prompt "..."`.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from ldm.commands import run_command, training_arguments

if TYPE_CHECKING:
    from torch import nn

    from data.loader import CaptionedImages
    from ldm.config import TrainConfig
    from ldm.engine import Engine, World
    from ldm.latent_diffusion import LatentDiffusion
    from ldm.run import Run

NOISE, POSTERIOR = 0, 1  # streams of random numbers, each a function of (seed, position) alone


def main(args: Namespace) -> None:
    import torch
    from torch import Tensor

    from data.loader import Batch, CaptionedImages, held_out
    from ldm.config import TrainConfig, dump, load_config
    from ldm.denoisers import attention_length, describe_attention
    from ldm.diffusion import diffusion_loss, draw_times, noise_sample, sample_randomness, target
    from ldm.engine import Engine, start_process
    from ldm.latents import LatentEncoder
    from ldm.loop import train
    from ldm.run import Run

    config = load_config(TrainConfig, args.config, args.overrides)
    world = start_process()
    run = Run(config.run, is_main=world.is_main, config_text=dump(config))
    images = CaptionedImages(config.data, seed=config.run.seed, rank=world.rank, ranks=world.ranks)
    validation = held_out(config.validation, image_size=config.data.image_size)
    model = frozen_half(config, world)
    torch.manual_seed(config.run.seed)
    denoiser = build(config, model)
    total, batch_size = config.run.steps, config.data.batch_size
    engine = Engine(denoiser, world, config=config.engine, optim=config.optim, batch_size=batch_size, total_steps=total)
    sampled = config.model.latents == "sample"
    encode = LatentEncoder(model.vae, keep=config.model.keep_latents, bf16=engine.bf16, sample=sampled)
    side = config.data.image_size // model.vae.config.factor
    shape = (model.vae.config.latent_channels, side, side)
    path, objective, dropout = config.model.path, config.model.objective, config.model.caption_dropout
    run.tell(f"{sum(p.numel() for p in denoiser.parameters()) / 1e6:.1f} M parameters, {len(images)} pictures, "
             f"{'bf16' if engine.bf16 else 'fp32'} on {world.device}")  # fmt: skip
    length = attention_length(config.model.denoiser, side)
    run.tell(describe_attention(world.device, length, torch.bfloat16 if engine.bf16 else torch.float32))

    def losses(batch: Batch) -> dict[str, Tensor]:
        """One pass of the algorithm: E || network(x_t, t, caption) - target ||^2, over pictures, times and noise."""
        seed = config.run.seed
        random = sample_randomness(seed * 2 + NOISE, batch.positions, shape)
        posterior_noise = sample_randomness(seed * 2 + POSTERIOR, batch.positions, shape).eps
        x0, eps = encode(batch, posterior_noise), random.eps.to(world.device)
        t = draw_times(objective, path, random.time_uniforms)
        # Without its caption now and then, the network also learns the unconditional answer that guidance needs.
        dropped = (random.drop_uniforms < dropout).tolist()
        text = model.condition(["" if drop else caption for drop, caption in zip(dropped, batch.captions, strict=True)])
        x_t, timesteps = noise_sample(x0, eps, path, t), path.timesteps(t).to(world.device)
        output = engine(x_t, timesteps, text.context, text.mask, text.pooled)
        return {"loss": diffusion_loss(output, target(objective.prediction, x0, eps, path, t)).mean()}

    train(engine, run, images, losses, sample=lambda step: preview(config, engine, run, model, validation, step))


def frozen_half(config: TrainConfig, world: World) -> LatentDiffusion:
    """The autoencoder and the text encoder, from the folders that the config names."""
    from pathlib import Path

    from ldm.interop.vae import load_vae
    from ldm.latent_diffusion import LatentDiffusion
    from text import load_text_encoder, load_tokenizer

    text = Path(config.model.text)
    return LatentDiffusion(
        vae=load_vae(Path(config.model.vae) / "vae").eval().requires_grad_(False).to(world.device),
        text_encoder=load_text_encoder(text / "text_encoder").eval().requires_grad_(False).to(world.device),
        tokenizer=load_tokenizer(text / "tokenizer"),
        path=config.model.path,
        prediction=config.model.objective.prediction,
    )


def build(config: TrainConfig, model: LatentDiffusion) -> nn.Module:
    from ldm.denoisers import build_denoiser

    side = config.data.image_size // model.vae.config.factor
    native = getattr(config.model.denoiser, "sample_size", side)
    if native != side:
        raise ValueError(
            f"model.denoiser.sample_size is {native}, but pictures of {config.data.image_size} pixels have latents of "
            f"{side} a side: set it to {side}"
        )
    channels, width = model.vae.config.latent_channels, model.text_encoder.config.width
    return build_denoiser(config.model.denoiser, latent_channels=channels, context_width=width)


def preview(
    config: TrainConfig, engine: Engine, run: Run, model: LatentDiffusion, validation: CaptionedImages, step: int
) -> None:
    """What the averaged weights can do: the loss on held-out pictures, a sheet of drawings, and an export."""
    import torch

    from ldm.config import dump
    from ldm.export import Trained, export
    from ldm.validation import drawings, held_out_loss

    weights = engine.averaged_weights()
    if not run.is_main:
        return
    denoiser = build(config, model).to(engine.world.device).eval().requires_grad_(False)
    denoiser.load_state_dict(weights)
    loss = held_out_loss(config, model, denoiser, validation, bf16=engine.bf16)
    run.tell(f"step {step}: held-out loss {loss:.4f}")
    run.record(step=step, held_out_loss=loss)
    drawings(config, model, denoiser, run.sample_path(step))
    side = config.data.image_size // model.vae.config.factor
    trained = Trained(
        model=model, denoiser=denoiser, config=config.model.denoiser, sample_size=side, notes=dump(config)
    )
    export(trained, config.run.path / "model", dtype=torch.float32)


if __name__ == "__main__":
    sys.exit(run_command(main, training_arguments(__doc__ or "")))
