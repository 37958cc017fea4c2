"""Denoisers: networks that see noisy latents, a time and a text, and predict what the objective asks for.

All share one call, `forward(x, t, context, context_mask, pooled) -> tensor like x`:
x B x C x H x W latents; t B float timesteps on the scale 0..1000 that the sinusoidal embedding sees (the
caller maps a path's times in [0, 1] to it); context B x L x D token states; context_mask B x L bool, True for
a real token; pooled B x D. A fresh denoiser returns exactly zero.
"""

from typing import assert_never

from torch import nn

from ldm.denoisers.attention import describe_attention
from ldm.denoisers.dit import DiT, DiTConfig
from ldm.denoisers.unet import UNet, UNetConfig

__all__ = [
    "DenoiserConfig",
    "DiT",
    "DiTConfig",
    "UNet",
    "UNetConfig",
    "attention_length",
    "build_denoiser",
    "describe_attention",
]

DenoiserConfig = UNetConfig | DiTConfig


def build_denoiser(
    config: DenoiserConfig, *, latent_channels: int, context_width: int, learned_variance: bool = False
) -> nn.Module:
    """A fresh denoiser. latent_channels follow from the VAE, context_width from the text encoder.

    learned_variance: with as many channels more in its answer, which say how wide a step of DDPM scatters.
    """
    channels = {"in_channels": latent_channels, "out_channels": (1 + learned_variance) * latent_channels}
    match config:
        case UNetConfig():
            return UNet(config, **channels, context_width=context_width)
        case DiTConfig():
            return DiT(config, **channels, context_width=context_width)
        case _:
            assert_never(config)


def attention_length(config: DenoiserConfig, side: int) -> int:
    """Tokens of the longest self-attention over latents of side x side."""
    match config:
        case UNetConfig():
            attending = [level for level, attends in enumerate(config.attention_levels) if attends]
            coarsest = len(config.attention_levels) - 1  # where the middle block attends in any case
            return (side // 2 ** min([*attending, coarsest])) ** 2
        case DiTConfig():
            return (side // config.patch_size) ** 2
        case _:
            assert_never(config)
