"""What the training of a denoiser starts from: the frozen half of the model, its latents, and start weights."""

from __future__ import annotations

import torch
from torch import Tensor

from data.loader import Batch
from ldm.denoisers import Denoiser
from ldm.files.paths import user_path
from ldm.interop.diffusers_layout.denoiser import layout_of, load_denoiser
from ldm.interop.diffusers_layout.folder import open_text_parts
from ldm.interop.diffusers_layout.vae import load_vae
from ldm.interop.network_files import load_strictly, model_folder
from ldm.model.conditioner import Conditioner
from ldm.model.latent_diffusion import LatentDiffusion
from ldm.training.denoiser_config import TrainConfig
from vae.autoencoder import AutoencoderKL, DiagonalGaussian


def frozen_half(config: TrainConfig, device: torch.device) -> LatentDiffusion:
    """Load the frozen autoencoder and text encoder from the folders named in the configuration."""
    towers = [part.read(torch.float32) for part in open_text_parts(user_path(config.model.text))]
    vae = load_vae(user_path(config.model.vae) / "vae")
    for network in (vae, *(tower.encoder for tower in towers)):
        network.eval().requires_grad_(False).to(device)
    return LatentDiffusion(
        vae=vae,
        conditioner=Conditioner(*towers),
        path=config.model.path,
        prediction=config.model.objective.prediction,
    )


def start_from(denoiser: Denoiser, config: TrainConfig, folder: str) -> None:
    """Load the weights of a model or run into a fresh denoiser. Raises ValueError if they are of another network."""
    source = model_folder(user_path(folder)) / layout_of(config.model.denoiser).folder
    load_strictly(denoiser, load_denoiser(source).network.state_dict(), source=source)


class LatentEncoder:
    """Encode batches into latents, B x C x h x w: samples of the frozen autoencoder's posterior, or its means.

    Stable Diffusion samples. Means are the better target if the autoencoder left a channel unused: its samples there
    are pure noise, which nothing can predict.
    With `keep`, each image's mean and log-variance stay in memory after the first encoding (8 kB for a 16 x 16 x 4
    latent). Without it every visit encodes again, as large data sets need.
    """

    def __init__(self, vae: AutoencoderKL, *, keep: bool, bf16: bool, sample: bool = True) -> None:
        self.vae, self.keep, self.bf16, self.sample = vae, keep, bf16, sample
        self.device = next(vae.parameters()).device
        self._kept: dict[tuple[int, int], Tensor] = {}  # (shard, index) -> mean and log-variance, 2C x h x w

    def __call__(self, batch: Batch, noise: Tensor) -> Tensor:
        """Return the latents of a batch. noise: standard normal, of their shape."""
        posterior = self.moments(batch)
        return posterior.sample(noise.to(self.device)) if self.sample else posterior.mean

    def moments(self, batch: Batch) -> DiagonalGaussian:
        if not self.keep:
            return self._encode(batch.pixels)
        missing = [row for row, sample in enumerate(batch.samples) if sample not in self._kept]
        if missing:
            # Encode the full batch: its size affects rounding, and the number of missing images depends on when this
            # process started.
            found = self._encode(batch.pixels)
            moments = torch.cat([found.mean, found.logvar], dim=1)
            self._kept |= {batch.samples[row]: moments[row].clone() for row in missing}
        return DiagonalGaussian.from_moments(torch.stack([self._kept[sample] for sample in batch.samples]))

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> DiagonalGaussian:
        pixels = pixels.to(self.device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            posterior = self.vae.encode(pixels)
        return DiagonalGaussian(posterior.mean.float(), posterior.logvar.float())
