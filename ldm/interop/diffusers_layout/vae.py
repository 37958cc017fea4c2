"""The autoencoder in diffusers' layout: vae/config.json and vae/diffusion_pytorch_model.safetensors."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.files.strict_json import read_json, write_json
from ldm.interop.network_files import (
    MAX_LAYERS,
    check_known,
    check_no_code,
    check_whole_numbers,
    described_by,
    fill,
    refuse_other,
    write_weights,
)
from ldm.interop.weight_files import WEIGHTS_STEM, find_weights
from ldm.interop.weight_reader import Weights
from vae.autoencoder import STABLE_DIFFUSION_SCALE, AutoencoderKL, AutoencoderKLConfig

ALWAYS = {
    "act_fn": "silu",
    "in_channels": 3,
    "mid_block_add_attention": True,
    "out_channels": 3,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
REST = ("down_block_types", "force_upcast", "latents_mean", "latents_std", "sample_size", "scaling_factor",
        "shift_factor", "up_block_types")  # fmt: skip
LIMITS = {"block_out_channels": 8192, "layers_per_block": MAX_LAYERS, "latent_channels": 256, "norm_num_groups": 1024}
# Older files, such as Stable Diffusion 1.5's, use these names for the attention's layers.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def save_vae(vae: AutoencoderKL, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write the autoencoder; config.json gets the statistics of its latents unchanged."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(vae_config_json(vae.config), folder / "config.json")
    write_weights(
        {name: tensor.to(dtype) for name, tensor in vae.state_dict().items()}, folder / f"{WEIGHTS_STEM}.safetensors"
    )


def load_vae(folder: Path, *, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Read an autoencoder, ours or diffusers'. Raises ValueError for anything else."""
    vae = open_vae(folder)
    fill(vae, vae_weights(folder), dtype=dtype)
    return vae


def open_vae(folder: Path) -> AutoencoderKL:
    """Build the autoencoder of meta tensors, from config.json alone; its weights are loaded later."""
    source = folder / "config.json"
    content = read_json(source)
    check_no_code(content, source=source)
    with described_by(source), torch.device("meta"):
        return AutoencoderKL(vae_config(content, source=source))


def vae_weights(folder: Path) -> Weights:
    return find_weights(folder, WEIGHTS_STEM).changed(with_new_names)


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
    config = dataclasses.replace(vae.config, latent_mean=None, latent_std=None)
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
    """Build config.json, as diffusers' AutoencoderKL writes it: latents = (z - latents_mean) * scaling_factor /
    latents_std."""
    levels, scale = len(config.block_out_channels), scale_of(config)
    return {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0",
        "act_fn": "silu",
        "block_out_channels": list(config.block_out_channels),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": False,
        "in_channels": 3,
        "latent_channels": config.latent_channels,
        "latents_mean": list(config.latent_mean) if config.latent_mean and scale is None else None,
        "latents_std": list(config.latent_std) if config.latent_std and scale is None else None,
        "layers_per_block": config.layers_per_block,
        "mid_block_add_attention": True,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": 3,
        "sample_size": 64,
        "scaling_factor": scale or (1.0 if config.latent_std else STABLE_DIFFUSION_SCALE),
        "shift_factor": None,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": True,
        "use_quant_conv": True,
    }


def vae_config(content: dict[str, Any], *, source: Path) -> AutoencoderKLConfig:
    """Convert diffusers' keys to our config. Raises ValueError if it describes another kind of network."""
    if content.get("_class_name") != "AutoencoderKL":
        raise ValueError(
            f"{source} describes {content.get('_class_name')!r}, expected 'AutoencoderKL': give a VAE's folder"
        )
    lacking = {"block_out_channels", "layers_per_block", "latent_channels"} - content.keys()
    if lacking:
        raise ValueError(f"{source} lacks {', '.join(sorted(lacking))}: copy it again")
    refuse_other(content, ALWAYS, source=source)
    check_known(content, (*ALWAYS, *LIMITS, *REST), source=source)
    check_whole_numbers(content, LIMITS, source=source)
    blocks = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    for key, block in blocks.items():
        if other := set(content.get(key) or [block]) - {block}:
            raise ValueError(
                f"{source} has a {min(other)} in {key}, expected {block}: this autoencoder is not supported"
            )
    channels = content["latent_channels"]
    mean = content.get("latents_mean") or [content.get("shift_factor") or 0.0] * channels
    scale = content.get("scaling_factor", STABLE_DIFFUSION_SCALE)
    if not 0 < scale < math.inf:
        raise ValueError(f"{source} has scaling_factor {scale}, expected a number above 0")
    std = [value / scale for value in content.get("latents_std") or [1.0] * channels]
    return AutoencoderKLConfig(
        block_out_channels=tuple(content["block_out_channels"]),
        layers_per_block=content["layers_per_block"],
        latent_channels=channels,
        norm_num_groups=content.get("norm_num_groups") or 32,  # diffusers' default in files that do not state it
        latent_mean=tuple(mean),
        latent_std=tuple(std),
    )
