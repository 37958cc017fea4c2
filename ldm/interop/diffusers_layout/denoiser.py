"""Denoisers in diffusers' layout: unet/ (UNet2DConditionModel) or transformer/ (PixArtTransformer2DModel)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import nn

from ldm.denoisers import DenoiserConfig, DiT, DiTConfig, UNet, UNetConfig
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
from ldm.model.components import LoadedDenoiser

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
UNET_OF_OTHERS: dict[str, Any] = {  # switches of diffusers' network that Stable Diffusion 1 and 2 leave alone
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "attention_type": "default",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "num_attention_heads": None,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}
# The last two say how it is computed, not what.
UNET_REST = ("down_block_types", "up_block_types", "use_linear_projection", "addition_embed_type_num_heads",
             "upcast_attention")  # fmt: skip
DIT_ALWAYS = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000,
    "use_additional_conditions": False,
}
UNET_LIMITS = {
    "attention_head_dim": 1024,
    "block_out_channels": 8192,
    "cross_attention_dim": 8192,
    "in_channels": 64,
    "layers_per_block": MAX_LAYERS,
    "norm_num_groups": 1024,
    "out_channels": 64,
    "sample_size": 4096,
}
DIT_LIMITS = {
    "attention_head_dim": 512,
    "caption_channels": 8192,
    "in_channels": 64,
    "num_attention_heads": 128,
    "num_layers": 256,
    "out_channels": 128,
    "patch_size": 64,
    "sample_size": 1024,
}
DIT_OF_OTHERS = {"dropout": 0.0, "attention_type": "default"}
DIT_REST = ("cross_attention_dim", "interpolation_scale", "norm_num_groups", "upcast_attention")
MAX_TABLE = 2**25  # numbers of the positions of native latents; PixArt for 2048 x 2048 pixels has half as many


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
    in_channels: int | None = None,
    learned_variance: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write config.json and the weights. sample_size: side of the latents that it was trained on.

    in_channels: where they are more than the latents', as for inpainting.
    """
    folder.mkdir(parents=True, exist_ok=True)
    match config:
        case UNetConfig():
            content = unet_config_json(config, sample_size=sample_size, channels=latent_channels, context=context_width)
        case DiTConfig():
            content = dit_config_json(config, channels=latent_channels, context=context_width)
        case _:
            assert_never(config)
    content["in_channels"] = in_channels or latent_channels
    content["out_channels"] = (1 + learned_variance) * latent_channels
    write_json(content, folder / "config.json")
    write_weights(
        {name: tensor.to(dtype) for name, tensor in denoiser.state_dict().items()},
        folder / f"{WEIGHTS_STEM}.safetensors",
    )


def load_denoiser(folder: Path, *, dtype: torch.dtype = torch.float32) -> LoadedDenoiser:
    """The network, and what it takes. Raises ValueError for anything else."""
    found = open_denoiser(folder)
    fill(found.network, find_weights(folder, WEIGHTS_STEM), dtype=dtype)
    return found


def open_denoiser(folder: Path) -> LoadedDenoiser:
    """The same of meta tensors, to be filled: only the config is read."""
    source = folder / "config.json"
    content = read_json(source)
    check_no_code(content, source=source)
    with described_by(source), torch.device("meta"):
        denoiser, config = _from_config(content, source=source)
        width = content["cross_attention_dim" if isinstance(config, UNetConfig) else "caption_channels"]
        return LoadedDenoiser(
            denoiser, config, int(content["sample_size"]), content["in_channels"], width, learns_variance(content)
        )


def learns_variance(content: Mapping[str, Any]) -> bool:
    """Whether a config.json tells of a second half of output channels. Raises KeyError if it tells of none at all."""
    return (content.get("out_channels") or content["in_channels"]) == 2 * content["in_channels"]


def _from_config(content: dict[str, Any], *, source: Path) -> tuple[nn.Module, DenoiserConfig]:
    match content.get("_class_name"):
        case "UNet2DConditionModel":
            unet = unet_config(content, source=source)
            channels = {"in_channels": content["in_channels"], "out_channels": content["out_channels"]}
            return UNet(unet, **channels, context_width=content["cross_attention_dim"]), unet
        case "PixArtTransformer2DModel" | "Transformer2DModel":  # the second before diffusers 0.29
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
    check_whole_numbers(content, UNET_LIMITS, source=source)
    refuse_other(content, UNET_ALWAYS | UNET_OF_OTHERS, source=source)
    check_known(content, (*UNET_ALWAYS, *UNET_OF_OTHERS, *UNET_LIMITS, *UNET_REST), source=source)
    known = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    unknown = [name for name in content["down_block_types"] if name not in known]
    if unknown:
        raise ValueError(f"{source} has a {unknown[0]}, expected {' or '.join(known)}: this U-Net is not supported")
    mirrored = [name.replace("Down", "Up") for name in reversed(content["down_block_types"])]
    if content.get("up_block_types", mirrored) != mirrored:
        raise ValueError(f"{source} has up_block_types {content['up_block_types']}, expected {mirrored}")
    heads = content.get("attention_head_dim") or 8  # diffusers' defaults, of before it wrote them down
    return UNetConfig(
        block_out_channels=tuple(content["block_out_channels"]),
        layers_per_block=content["layers_per_block"],
        attention_levels=tuple(known[name] for name in content["down_block_types"]),
        heads=tuple(heads) if isinstance(heads, list) else heads,
        use_linear_projection=content.get("use_linear_projection", False),
        norm_num_groups=content.get("norm_num_groups") or 32,
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
    check_whole_numbers(content, DIT_LIMITS, source=source)
    refuse_other(content, DIT_ALWAYS | DIT_OF_OTHERS, source=source)
    check_known(content, (*DIT_ALWAYS, *DIT_OF_OTHERS, *DIT_LIMITS, *DIT_REST), source=source)
    tokens = (content["sample_size"] // content["patch_size"]) ** 2
    if tokens * content["num_attention_heads"] * content["attention_head_dim"] > MAX_TABLE:
        raise ValueError(
            f"{source} has sample_size {content['sample_size']} and patch_size {content['patch_size']}: the table of "
            f"{tokens} positions would be too large"
        )
    return DiTConfig(
        depth=content["num_layers"],
        width=content["num_attention_heads"] * content["attention_head_dim"],
        heads=content["num_attention_heads"],
        sample_size=content["sample_size"],
        patch_size=content["patch_size"],
        interpolation_scale=content.get("interpolation_scale"),
    )
