"""The autoencoder in diffusers' layout: vae/config.json and vae/diffusion_pytorch_model.safetensors."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.interop.diffusers_layout.layout import VERSION, ConfigJson, fixed, whole
from ldm.interop.network_files import MAX_LAYERS, described_by, fill, find_weights, read_config, write_network
from ldm.interop.weight_reader import Weights
from vae.autoencoder import STABLE_DIFFUSION_SCALE, AutoencoderKL, AutoencoderKLConfig

DOWN_BLOCK, UP_BLOCK = "DownEncoderBlock2D", "UpDecoderBlock2D"
# Older files, such as Stable Diffusion 1.5's, use these names for the attention's layers.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True, kw_only=True)
class VaeJson(ConfigJson):
    """The keys of vae/config.json: latents = (z - latents_mean) * scaling_factor / latents_std."""

    _class_name: str = "AutoencoderKL"
    _diffusers_version: str = VERSION
    act_fn: str = fixed("silu")
    block_out_channels: list[int] = whole(8192)
    down_block_types: list[str] | None = None
    force_upcast: bool = False
    in_channels: int = fixed(3)
    latent_channels: int = whole(256)
    latents_mean: list[float] | None = None
    latents_std: list[float] | None = None
    layers_per_block: int = whole(MAX_LAYERS)
    mid_block_add_attention: bool = fixed(True)
    norm_num_groups: int = whole(1024, default=32)
    out_channels: int = fixed(3)
    sample_size: int = 64
    scaling_factor: float = STABLE_DIFFUSION_SCALE
    shift_factor: float | None = None
    up_block_types: list[str] | None = None
    use_post_quant_conv: bool = fixed(True)
    use_quant_conv: bool = fixed(True)


def save_vae(vae: AutoencoderKL, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write the autoencoder; config.json gets the statistics of its latents unchanged."""
    write_network(vae, vae_config_json(vae.config), folder, dtype=dtype)


def load_vae(folder: Path, *, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Read an autoencoder, ours or diffusers'. Raises ValueError for anything else."""
    vae = open_vae(folder)
    fill(vae, vae_weights(folder), dtype=dtype)
    return vae


def open_vae(folder: Path) -> AutoencoderKL:
    """Build the autoencoder of meta tensors, from config.json alone; its weights are loaded later."""
    source = folder / "config.json"
    content = read_config(source)
    with described_by(source), torch.device("meta"):
        return AutoencoderKL(vae_config(content, source=source))


def vae_weights(folder: Path) -> Weights:
    return find_weights(folder).changed(with_new_names)


def with_new_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    for old, new in OLD_NAMES.items():
        weights = {name.replace(old, new): tensor for name, tensor in weights.items()}
    return weights


def folded(vae: AutoencoderKL) -> AutoencoderKL:
    """Fold the statistics of the latents into the 1x1 convolutions, so that only the scale 0.18215 remains.

    Stable Diffusion's pipelines multiply z by a scale and do not subtract a mean, so for them z' must be
    z' = (z - mean) / (0.18215 std): this is folded into the last encoder layer, its inverse into the first decoder
    layer. If there is only a scale, nothing needs to be folded, and the weights stay as they are.
    """
    if scale_of(vae.config) is not None:
        return vae
    config = replace(vae.config, latent_mean=None, latent_std=None)
    copy = AutoencoderKL(config)
    copy.load_state_dict(vae.state_dict())
    channels = config.latent_channels
    mean = torch.tensor(vae.config.latent_mean or (0.0,) * channels, dtype=torch.float64)
    std = torch.tensor(vae.config.latent_std or (1 / STABLE_DIFFUSION_SCALE,) * channels, dtype=torch.float64)
    factor = std * STABLE_DIFFUSION_SCALE  # z = factor z' + mean
    with torch.no_grad():
        quant, post = copy.quant_conv, copy.post_quant_conv
        assert quant.bias is not None and post.bias is not None
        quant.weight /= torch.cat([factor, torch.ones(channels)]).view(-1, 1, 1, 1)
        quant.bias[:channels] = (quant.bias[:channels] - mean) / factor
        quant.bias[channels:] -= 2 * factor.log()  # the other half is the log-variance
        post.bias += post.weight.double().flatten(1) @ mean
        post.weight *= factor.view(1, -1, 1, 1)
    return copy


def scale_of(config: AutoencoderKLConfig) -> float | None:
    """Return the factor from z to latents; None if more than a scale is applied."""
    if config.latent_std is None:
        return None if config.latent_mean and any(config.latent_mean) else STABLE_DIFFUSION_SCALE
    if any(config.latent_mean or ()) or len(set(config.latent_std)) > 1:
        return None
    return float(f"{1 / config.latent_std[0]:.12g}")


def vae_config_json(config: AutoencoderKLConfig) -> dict[str, Any]:
    """Build config.json, as diffusers' AutoencoderKL writes it."""
    levels, scale = len(config.block_out_channels), scale_of(config)
    return VaeJson(
        block_out_channels=list(config.block_out_channels),
        down_block_types=[DOWN_BLOCK] * levels,
        latent_channels=config.latent_channels,
        latents_mean=list(config.latent_mean) if config.latent_mean and scale is None else None,
        latents_std=list(config.latent_std) if config.latent_std and scale is None else None,
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
        scaling_factor=scale or (1.0 if config.latent_std else STABLE_DIFFUSION_SCALE),
        up_block_types=[UP_BLOCK] * levels,
    ).to_json()


def vae_config(content: dict[str, Any], *, source: Path) -> AutoencoderKLConfig:
    """Convert diffusers' keys to our config. Raises ValueError if it describes another kind of network."""
    if (kind := content.get("_class_name")) != "AutoencoderKL":
        raise ValueError(f"{source} describes {kind!r}, expected 'AutoencoderKL': give a VAE's folder")
    found = VaeJson.from_json(content, source=source)
    blocks = {"down_block_types": DOWN_BLOCK, "up_block_types": UP_BLOCK}
    for key, block in blocks.items():
        if odd := set(getattr(found, key) or [block]) - {block}:
            raise ValueError(f"{source} has a {min(odd)} in {key}, expected {block}: this autoencoder is not supported")
    channels, scale = found.latent_channels, found.scaling_factor
    if not 0 < scale < math.inf:
        raise ValueError(f"{source} has scaling_factor {scale}, expected a number above 0")
    return AutoencoderKLConfig(
        block_out_channels=tuple(found.block_out_channels),
        layers_per_block=found.layers_per_block,
        latent_channels=channels,
        norm_num_groups=found.norm_num_groups,
        latent_mean=tuple(found.latents_mean or [found.shift_factor or 0.0] * channels),
        latent_std=tuple(value / scale for value in found.latents_std or [1.0] * channels),
    )
