"""The KL autoencoder: pixels <-> latents."""

from vae.autoencoder import AutoencoderKL, AutoencoderKLConfig, DiagonalGaussian

__all__ = ["AutoencoderKL", "AutoencoderKLConfig", "DiagonalGaussian"]
