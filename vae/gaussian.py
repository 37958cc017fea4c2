"""The encoder's posterior q(z|x): a Gaussian with a diagonal covariance (Kingma & Welling 2013)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DiagonalGaussian:
    """N(mean, diag(exp(logvar))); both B x C x h x w."""

    mean: Tensor
    logvar: Tensor

    @classmethod
    def from_moments(cls, moments: Tensor) -> DiagonalGaussian:
        """Split moments B x 2C x h x w into mean and log-variance, which is clamped so that exp stays finite."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, logvar.clamp(-30.0, 20.0))

    def sample(self, noise: Tensor) -> Tensor:
        """Sample by reparametrisation: z = mu + sigma * eps, eps ~ N(0, I), shaped like the mean."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> Tensor:
        """Compute KL(q || N(0, I)) = 1/2 sum(mu^2 + sigma^2 - 1 - log sigma^2), in nats per image: B."""
        mean, logvar = self.mean.float(), self.logvar.float()  # in bfloat16, sums of thousands of terms lose precision
        terms = mean.square() + logvar.exp() - 1.0 - logvar
        return 0.5 * terms.flatten(1).sum(dim=1)
