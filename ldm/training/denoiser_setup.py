"""What a denoiser is trained upon: frozen networks, the weights that it starts from, and importance-sampled times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.denoisers import Denoiser
from ldm.diffusion import LossHistory
from ldm.interop.diffusers_layout.denoiser import denoiser_folder, load_denoiser
from ldm.interop.diffusers_layout.vae import load_vae
from ldm.interop.network_files import load_strictly, model_folder
from ldm.model.conditioner import Conditioner, TextTower
from ldm.model.latent_diffusion import LatentDiffusion
from ldm.training.denoiser_config import TrainConfig
from ldm.training.engine.distributed import Ranks
from text.kinds import load_text_encoder
from text.tokenizer import load_tokenizer


def frozen_half(config: TrainConfig, device: torch.device) -> LatentDiffusion:
    """Load the frozen autoencoder and text encoder from the folders named in the configuration."""
    text = Path(config.model.text)
    encoder = load_text_encoder(text / "text_encoder").eval().requires_grad_(False).to(device)
    return LatentDiffusion(
        vae=load_vae(Path(config.model.vae) / "vae").eval().requires_grad_(False).to(device),
        conditioner=Conditioner(TextTower(encoder, load_tokenizer(text / "tokenizer"))),
        path=config.model.path,
        prediction=config.model.objective.prediction,
    )


def latent_side(config: TrainConfig, model: LatentDiffusion) -> int:
    """Return the side of the latents. Raises ValueError if the image size is not a multiple of the factor."""
    size, factor = config.data.image_size, model.vae.config.factor
    if size % factor:
        raise ValueError(f"data.image_size is {size}, not a multiple of {factor}, the factor of {config.model.vae}")
    return size // factor


def start_from(denoiser: Denoiser, config: TrainConfig, folder: str) -> None:
    """Load the weights of a model or run into a fresh denoiser. Raises ValueError if they are of another network."""
    source = model_folder(Path(folder)) / denoiser_folder(config.model.denoiser)
    load_strictly(denoiser, load_denoiser(source).network.state_dict(), source=source)


def by_importance(
    losses: Tensor, numbers: Tensor, positions: Sequence[int], history: LossHistory, world: Ranks
) -> Tensor:
    """Divide the losses, B, by the density of their times; then record the losses of all ranks in the history."""
    weighted = losses / history.density(numbers).to(losses)
    columns = torch.tensor(positions), numbers, losses.detach().cpu()
    rows = torch.stack([column.double() for column in columns], dim=1)  # float32 counts only to 2^24
    everywhere = world.gather(rows.to(world.device)).cpu()
    _, seen, found = everywhere[everywhere[:, 0].argsort()].T
    if found.isfinite().all():  # otherwise the engine skips this batch
        history.record(seen, found)
    return weighted
