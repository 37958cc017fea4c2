"""Training loss of the autoencoder: pixel and perceptual distances, and the KL of the posterior to N(0, I)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from vae.gaussian import DiagonalGaussian
from vae.perceptual import EfficientNetDistance


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
