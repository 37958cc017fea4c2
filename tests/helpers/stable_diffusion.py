"""Stable Diffusion 1 and 2 in miniature: everything that tells them apart, and random weights."""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import torch
from torch import nn

from ldm.denoisers import DiTConfig, UNet, UNetConfig
from ldm.diffusion import PathConfig, Prediction, ScaledLinearBetaPath
from ldm.model.components import ModelComponents
from ldm.model.conditioner import Conditioner, TextTower
from ldm.model.latent_diffusion import LatentDiffusion
from text import TextEncoderConfig, Tokenizer, TransformersTextEncoder
from vae import AutoencoderKL, AutoencoderKLConfig

Version = Literal[1, 2]

# Heads and groups are what a single file does not tell: as many as in the real ones, 8 or 64 wide, and 32.
UNETS: dict[Version, UNetConfig] = {
    1: UNetConfig(block_out_channels=(32, 64), layers_per_block=1, attention_levels=(True, False), heads=8),
    2: UNetConfig(
        block_out_channels=(64, 128),
        layers_per_block=2,
        attention_levels=(True, True),
        heads=(1, 2),
        use_linear_projection=True,
    ),
}
TEXTS: dict[Version, TextEncoderConfig] = {
    1: TextEncoderConfig(width=64, layers=2, heads=1, intermediate_size=96, projection_dim=None),
    2: TextEncoderConfig(
        width=64, layers=24, heads=1, intermediate_size=64, activation="gelu", hidden="penultimate", pad_id=0,
        projection_dim=None,
    ),
}  # fmt: skip
VAE = AutoencoderKLConfig(block_out_channels=(32, 32, 64), layers_per_block=1, latent_std=(1 / 0.18215,) * 4)
DIT = DiTConfig(depth=2, width=64, heads=2, sample_size=8)

Network = TypeVar("Network", bound=nn.Module)


def stirred(network: Network, *, by: float, seed: int) -> Network:
    """No parameter at a value that hides a mistake, such as zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return network.eval().requires_grad_(False)


def stable_diffusion(
    version: Version = 1,
    *,
    prediction: Prediction = "eps",
    inpainting: bool = False,
    transformer: bool = False,
    path: PathConfig | None = None,
) -> ModelComponents:
    """A whole model with latents of 8 x 8 x 4 for pictures of 32 x 32; the same weights each time."""
    torch.manual_seed(version)
    config, text = DIT if transformer else UNETS[version], TEXTS[version]
    denoiser = config.build(latent_channels=4, concat_channels=5 * inpainting, context_width=text.width)
    encoder = stirred(TransformersTextEncoder(text), by=0.05, seed=2)
    model = LatentDiffusion(
        vae=stirred(AutoencoderKL(VAE), by=0.05, seed=1),
        conditioner=Conditioner(TextTower(encoder, Tokenizer(text.tokenizer))),
        path=path or ScaledLinearBetaPath(),
        prediction=prediction,
    )
    return ModelComponents(model=model, denoiser=stirred(denoiser, by=0.05, seed=3), config=config, sample_size=8)


def states(parts: ModelComponents) -> dict[str, torch.Tensor]:
    """All parameters of a model, by part and name."""
    encoder = parts.model.conditioner.encoders[0]
    assert isinstance(encoder, TransformersTextEncoder)
    networks = {"denoiser": parts.denoiser, "vae": parts.model.vae, "text": encoder.model}
    return {f"{part}.{name}": t for part, network in networks.items() for name, t in network.state_dict().items()}


@torch.no_grad()
def answering_with_the_noise(denoiser: nn.Module) -> None:
    """Make a U-Net return the first channels of its input: what one that predicts eps does with pure noise.

    The first convolution makes pairs x, -x, which a group norm leaves as they are; the last block takes them over from
    the way down, and silu(x) - silu(-x) = x.
    """
    assert isinstance(denoiser, UNet)
    for parameter in denoiser.parameters():
        parameter.zero_()
    final, layers = len(denoiser.up_blocks) - 1, denoiser.skips_per_block
    last: Any = denoiser.get_submodule(f"up_blocks.{final}.resnets.{layers - 1}")
    conv_in, conv_out = denoiser.conv_in, denoiser.conv_out
    width, channels = conv_in.out_channels, conv_out.out_channels
    groups = width // 2 // channels  # of pairs for each channel
    for i in range(width):
        channel, sign = i // 2 % channels, 1 - 2 * (i % 2)
        conv_in.weight[i, channel, 1, 1] = sign
        conv_out.weight[channel, i, 1, 1] = sign / groups
        last.conv_shortcut.weight[i, last.conv_shortcut.in_channels - width + i] = 1
    denoiser.conv_norm_out.weight.fill_(1)
