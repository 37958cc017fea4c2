"""Denoisers: networks that see noisy latents, a time and a condition, and predict what the objective asks for.

To add one: a file with a config (DenoiserFacts) and a network (Denoiser), and its config in DenoiserConfig, which is
the registry. YAML's `kind`, the contract's tests, export and loading follow.
"""

from typing import get_args

from ldm.denoisers.attention import describe_attention
from ldm.denoisers.contract import Condition, Denoiser, DenoiserFacts, Output
from ldm.denoisers.dit import DiT, DiTConfig
from ldm.denoisers.unet import UNet, UNetConfig

__all__ = [
    "DENOISERS",
    "Condition",
    "Denoiser",
    "DenoiserConfig",
    "DenoiserFacts",
    "DiT",
    "DiTConfig",
    "Output",
    "UNet",
    "UNetConfig",
    "describe_attention",
]

DenoiserConfig = UNetConfig | DiTConfig
DENOISERS: dict[str, type[DenoiserConfig]] = {config.kind: config for config in get_args(DenoiserConfig)}
