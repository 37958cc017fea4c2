"""The KL autoencoder: pixels <-> latents."""

from vae.autoencoder import AutoencoderKL, AutoencoderKLConfig
from vae.gaussian import DiagonalGaussian

__all__ = ["AutoencoderKL", "AutoencoderKLConfig", "DiagonalGaussian"]
