"""Train a text-to-image denoiser on captioned shards.

    deepspeed ldm/train.py --config configs/emoji64_dit.yaml [section.key=value ...]

Plain `python` and torchrun start it too. Every run.sample_every steps the averaged weights are exported to RUN/model,
which txt2img.py draws with: `python txt2img.py --ckpt runs/NAME/model --prompt "..."`.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING

from ldm.cli.parser import training_arguments
from ldm.cli.run import run_command

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from data.loader import Batch
    from ldm.denoisers import Denoiser
    from ldm.diffusion import LossHistory
    from ldm.model.latent_diffusion import LatentDiffusion
    from ldm.training.configs import TrainConfig
    from ldm.training.engine.distributed import Ranks
    from ldm.training.engine.engine import Engine
    from ldm.training.loop import Session

NOISE, POSTERIOR = 0, 1  # streams of random numbers, each a function of (seed, position) alone


def main(args: Namespace) -> None:
    import torch

    from ldm.denoisers import describe_attention
    from ldm.diffusion import LossHistory
    from ldm.training.checkpoints.rng_state import seed_generators
    from ldm.training.configs import TrainConfig
    from ldm.training.loop import open_session, train

    session = open_session(TrainConfig, args)
    config, world, run = session.config, session.world, session.run
    model = frozen_half(config, world)
    seed_generators(config.run.seed)
    denoiser = build(config, model)
    if config.model.start is not None:
        start_from(denoiser, config, config.model.start)
    engine = session.engine(denoiser)
    run.tell(f"{sum(p.numel() for p in denoiser.parameters()) / 1e6:.1f} M parameters, {len(session.images)} pictures, "
             f"{engine.precision} on {world.device}")  # fmt: skip
    length = config.model.denoiser.attention_length(latent_side(config, model))
    run.tell(describe_attention(world.device, length, torch.bfloat16 if engine.bf16 else torch.float32))
    history = LossHistory() if config.model.objective.time_sampling == "importance" else None
    losses = training_losses(config, engine, model, history)
    train(session, engine, losses, partial(preview, session, model), state=history)


def training_losses(
    config: TrainConfig, engine: Engine, model: LatentDiffusion, history: LossHistory | None
) -> Callable[[Batch], dict[str, Tensor]]:
    """The algorithm: E w(t) || network(x_t, t, caption) - target ||^2, over pictures, times and noise."""
    from ldm.diffusion import by_quantile, draw_times, sample_randomness, spread_uniforms, training_noise
    from ldm.samplers.guidance import drop_captions
    from ldm.training.latent_cache import LatentEncoder

    sampled = config.model.latents == "sample"
    encode = LatentEncoder(model.vae, keep=config.model.keep_latents, bf16=engine.bf16, sample=sampled)
    side, device = latent_side(config, model), engine.world.device
    shape = (model.vae.config.latent_channels, side, side)
    seed, objective, batch_size = config.run.seed, config.model.objective, config.data.batch_size

    def losses(batch: Batch) -> dict[str, Tensor]:
        positions = batch.positions
        random = sample_randomness(seed * 2 + NOISE, positions, shape)
        x0 = encode(batch, sample_randomness(seed * 2 + POSTERIOR, positions, shape).eps)
        eps, added = training_noise(objective, random.eps, seed=seed, positions=positions)
        uniforms = spread_uniforms(
            objective.time_numbers, random.time_uniforms, positions, batch_size=batch_size, seed=seed
        )
        numbers = uniforms if history is None else history.numbers(uniforms)
        t = draw_times(objective, model.path, numbers)
        captions = drop_captions(batch.captions, random.drop_uniforms, config.model.caption_dropout)
        condition = model.conditioner(captions)
        found = model.losses(engine, x0, eps.to(device), t, condition, added=added.to(device))
        weighted = found.weighted(objective, model.path, t)
        if history is not None:
            weighted = by_importance(weighted, numbers, positions, history, engine)
        return {"loss": weighted.mean(), **by_quantile(found.error, uniforms)}

    return losses


def by_importance(
    losses: Tensor, numbers: Tensor, positions: Sequence[int], history: LossHistory, engine: Engine
) -> Tensor:
    """The losses, B, counted less where their times are drawn more often; then history learns those of all ranks."""
    import torch

    counted = losses / history.density(numbers).to(losses)
    columns = torch.tensor(positions), numbers, losses.detach().cpu()
    rows = torch.stack([column.double() for column in columns], dim=1)  # float32 counts only to 2^24
    everywhere = engine.world.gather(rows.to(engine.world.device)).cpu()
    _, seen, found = everywhere[everywhere[:, 0].argsort()].T
    if found.isfinite().all():  # otherwise the engine skips this batch
        history.record(seen, found)
    return counted


def frozen_half(config: TrainConfig, world: Ranks) -> LatentDiffusion:
    """The autoencoder and the text encoder, from the folders that the config names."""
    from pathlib import Path

    from ldm.interop.diffusers_layout.vae import load_vae
    from ldm.model.conditioner import Conditioner, TextTower
    from ldm.model.latent_diffusion import LatentDiffusion
    from text import load_text_encoder, load_tokenizer

    text = Path(config.model.text)
    encoder = load_text_encoder(text / "text_encoder").eval().requires_grad_(False).to(world.device)
    return LatentDiffusion(
        vae=load_vae(Path(config.model.vae) / "vae").eval().requires_grad_(False).to(world.device),
        conditioner=Conditioner(TextTower(encoder, load_tokenizer(text / "tokenizer"))),
        path=config.model.path,
        prediction=config.model.objective.prediction,
    )


def latent_side(config: TrainConfig, model: LatentDiffusion) -> int:
    """Raises ValueError if the pictures do not become whole latents."""
    size, factor = config.data.image_size, model.vae.config.factor
    if size % factor:
        raise ValueError(f"data.image_size is {size}, not a multiple of {factor}, the factor of {config.model.vae}")
    return size // factor


def build(config: TrainConfig, model: LatentDiffusion) -> Denoiser:
    side, native = latent_side(config, model), config.model.denoiser.native_side
    if native not in (None, side):
        raise ValueError(
            f"model.denoiser.sample_size is {native}, but pictures of {config.data.image_size} pixels have latents of "
            f"{side} a side: set it to {side}"
        )
    return config.model.denoiser.build(
        latent_channels=model.vae.config.latent_channels,
        context_width=model.conditioner.width,
        learned_variance=config.model.objective.learned_variance,
    )


def start_from(denoiser: nn.Module, config: TrainConfig, folder: str) -> None:
    """Give a fresh denoiser the weights of a model or run. Raises ValueError if they are another network's."""
    from pathlib import Path

    from ldm.interop.diffusers_layout.denoiser import denoiser_folder, load_denoiser
    from ldm.interop.network_files import load_strictly, model_folder

    source = model_folder(Path(folder)) / denoiser_folder(config.model.denoiser)
    load_strictly(denoiser, load_denoiser(source).network.state_dict(), source=source)


def preview(session: Session[TrainConfig], model: LatentDiffusion, step: int, weights: dict[str, Tensor]) -> None:
    """What averaged weights can do: the loss on held-out pictures, a sheet of drawings, and an export."""
    import torch

    from ldm.inference.pipeline import TextToImage
    from ldm.interop.diffusers_layout.folder import write_folder
    from ldm.interop.network_files import RUN_MODEL
    from ldm.model.components import ModelComponents
    from ldm.training.engine.config import resolved_precision
    from ldm.training.validation import drawings, held_out_losses

    config, run = session.config, session.run
    bf16 = resolved_precision(config.engine.precision, session.world.device) == "bf16"
    denoiser = build(config, model).to(session.world.device).eval().requires_grad_(False)
    denoiser.load_state_dict(weights)
    losses = held_out_losses(config, model, denoiser, session.validation, bf16=bf16)
    run.tell(f"step {step}: held-out loss {losses['held_out_loss']:.4f}")
    parts = ModelComponents(
        model=model,
        denoiser=denoiser,
        config=config.model.denoiser,
        sample_size=latent_side(config, model),
        notes=run.config_text,
    )
    pipe = TextToImage(parts, name=config.run.name, weights_hash=f"step {step}")
    drawings(config.preview, pipe, run.sample_path(step))
    write_folder(parts, config.run.path / RUN_MODEL, dtype=torch.float32)
    run.record(step=step, **losses)  # last: a step that is recorded has been drawn and exported


if __name__ == "__main__":
    sys.exit(run_command(main, training_arguments(__doc__ or "")))
