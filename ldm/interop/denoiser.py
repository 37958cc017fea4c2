"""Denoisers in diffusers' layout: unet/ (UNet2DConditionModel) or transformer/ (PixArtTransformer2DModel)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, assert_never

import torch
from torch import nn

from ldm.denoisers import DenoiserConfig, DiT, DiTConfig, UNet, UNetConfig
from ldm.interop.files import (
    described_by,
    load_strictly,
    read_json,
    read_weights,
    refuse_other,
    to_float32,
    write_json,
    write_weights,
)

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
# What these networks always are; other values would load, and compute something else.
UNET_ALWAYS = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
}
DIT_ALWAYS = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000,
    "use_additional_conditions": False,
}


def denoiser_folder(config: DenoiserConfig) -> str:
    """The folder's name that diffusers' pipelines look for."""
    return "unet" if isinstance(config, UNetConfig) else "transformer"


def save_denoiser(
    denoiser: nn.Module,
    config: DenoiserConfig,
    folder: Path,
    *,
    sample_size: int,
    latent_channels: int,
    context_width: int,
    learned_variance: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write config.json and the weights. sample_size: side of the latents that it was trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    match config:
        case UNetConfig():
            content = unet_config_json(config, sample_size=sample_size, channels=latent_channels, context=context_width)
        case DiTConfig():
            content = dit_config_json(config, channels=latent_channels, context=context_width)
        case _:
            assert_never(config)
    content["out_channels"] = (1 + learned_variance) * latent_channels
    write_json(content, folder / "config.json")
    write_weights({name: tensor.to(dtype) for name, tensor in denoiser.state_dict().items()}, folder / WEIGHTS_NAME)


class LoadedDenoiser(NamedTuple):
    network: nn.Module
    config: DenoiserConfig
    sample_size: int  # side of its native latents
    in_channels: int
    context_width: int
    learned_variance: bool  # whether it has a second half of output channels


def load_denoiser(folder: Path) -> LoadedDenoiser:
    """The network, in float32, and what it takes. Raises ValueError for anything else."""
    source = folder / "config.json"
    content = read_json(source)
    with described_by(source), torch.device("meta"):
        denoiser, config = _from_config(content, source=source)
        width = content["cross_attention_dim" if isinstance(config, UNetConfig) else "caption_channels"]
        found = LoadedDenoiser(
            denoiser, config, int(content["sample_size"]), content["in_channels"], width, learns_variance(content)
        )
    load_strictly(denoiser, to_float32(read_weights(folder / WEIGHTS_NAME)), source=folder / WEIGHTS_NAME)
    return found


def learns_variance(content: Mapping[str, Any]) -> bool:
    """Whether a config.json tells of a second half of output channels. Raises KeyError if it tells of none at all."""
    return (content.get("out_channels") or content["in_channels"]) == 2 * content["in_channels"]


def _from_config(content: dict[str, Any], *, source: Path) -> tuple[nn.Module, DenoiserConfig]:
    match content.get("_class_name"):
        case "UNet2DConditionModel":
            unet = unet_config(content, source=source)
            channels = {"in_channels": content["in_channels"], "out_channels": content["out_channels"]}
            return UNet(unet, **channels, context_width=content["cross_attention_dim"]), unet
        case "PixArtTransformer2DModel":
            dit = dit_config(content, source=source)
            channels = {"in_channels": content["in_channels"], "out_channels": content.get("out_channels")}
            channels["out_channels"] = channels["out_channels"] or channels["in_channels"]
            return DiT(dit, **channels, context_width=content["caption_channels"]), dit
        case kind:
            known = "UNet2DConditionModel or PixArtTransformer2DModel"
            raise ValueError(f"{source} describes {kind!r}, expected {known}: give a denoiser's folder")


def unet_config_json(config: UNetConfig, *, sample_size: int, channels: int, context: int) -> dict[str, Any]:
    """config.json as diffusers' UNet2DConditionModel writes it."""
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention_levels]
    up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention_levels)]
    return UNET_ALWAYS | {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.30.0",
        # The number of heads, whatever diffusers calls it.
        "attention_head_dim": list(config.heads) if isinstance(config.heads, tuple) else config.heads,
        "block_out_channels": list(config.block_out_channels),
        "cross_attention_dim": context,
        "down_block_types": down,
        "in_channels": channels,
        "layers_per_block": config.layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "out_channels": channels,
        "sample_size": sample_size,
        "up_block_types": up,
        "use_linear_projection": config.use_linear_projection,
    }


def unet_config(content: dict[str, Any], *, source: Path) -> UNetConfig:
    """Our config from diffusers' keys. Raises ValueError for blocks that Stable Diffusion 1 and 2 do not have."""
    refuse_other(content, UNET_ALWAYS | {"resnet_time_scale_shift": "default"}, source=source)
    known = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    unknown = [name for name in content["down_block_types"] if name not in known]
    if unknown:
        raise ValueError(f"{source} has a {unknown[0]}, expected {' or '.join(known)}: this U-Net is not supported")
    heads = content["attention_head_dim"]
    return UNetConfig(
        block_out_channels=tuple(content["block_out_channels"]),
        layers_per_block=content["layers_per_block"],
        attention_levels=tuple(known[name] for name in content["down_block_types"]),
        heads=tuple(heads) if isinstance(heads, list) else heads,
        use_linear_projection=content.get("use_linear_projection", False),
        norm_num_groups=content["norm_num_groups"],
    )


def dit_config_json(config: DiTConfig, *, channels: int, context: int) -> dict[str, Any]:
    """config.json as diffusers' PixArtTransformer2DModel writes it."""
    return DIT_ALWAYS | {
        "_class_name": "PixArtTransformer2DModel",
        "_diffusers_version": "0.30.0",
        "attention_head_dim": config.width // config.heads,
        "caption_channels": context,
        "cross_attention_dim": config.width,
        "in_channels": channels,
        "interpolation_scale": config.position_scale,
        "num_attention_heads": config.heads,
        "num_layers": config.depth,
        "out_channels": channels,
        "patch_size": config.patch_size,
        "sample_size": config.sample_size,
    }


def dit_config(content: dict[str, Any], *, source: Path) -> DiTConfig:
    """Our config from diffusers' keys. Raises ValueError for what PixArt does not have."""
    refuse_other(content, DIT_ALWAYS, source=source)
    return DiTConfig(
        depth=content["num_layers"],
        width=content["num_attention_heads"] * content["attention_head_dim"],
        heads=content["num_attention_heads"],
        sample_size=content["sample_size"],
        patch_size=content["patch_size"],
        interpolation_scale=content.get("interpolation_scale"),
    )
