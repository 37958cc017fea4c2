"""Denoisers: networks that take noisy latents, a time and a condition, and predict the objective's target.

To add one, write a file with a config (DenoiserFacts) and a network (Denoiser), and add the config to DenoiserConfig,
which is the registry. YAML's `kind`, the contract's tests, export and loading follow.
"""

from typing import get_args

from ldm.denoisers.attention import choose_attention, describe_attention
from ldm.denoisers.contract import Condition, Denoiser, DenoiserFacts, Output
from ldm.denoisers.dit import DiT, DiTConfig
from ldm.denoisers.unet import UNet, UNetConfig

__all__ = [
    "DENOISERS", "Condition", "Denoiser", "DenoiserConfig", "DenoiserFacts", "DiT", "DiTConfig", "Output", "UNet",
    "UNetConfig", "choose_attention", "describe_attention",
]

DenoiserConfig = UNetConfig | DiTConfig
DENOISERS: dict[str, type[DenoiserConfig]] = {config.kind: config for config in get_args(DenoiserConfig)}
