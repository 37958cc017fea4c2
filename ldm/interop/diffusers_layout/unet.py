"""Stable Diffusion's U-Net in diffusers' layout: unet/, a UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.denoisers import Denoiser, UNetConfig
from ldm.interop.compvis.names import unet_modules
from ldm.interop.diffusers_layout.layout import VERSION, DenoiserLayout, Surroundings
from ldm.interop.diffusers_layout.schema import ConfigJson, fixed, whole
from ldm.interop.network_files import MAX_LAYERS

BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # on the way down; whether they have attention


@dataclass(frozen=True, kw_only=True)
class UNetJson(ConfigJson):
    """The keys of unet/config.json."""

    act_fn: str = fixed("silu")
    center_input_sample: bool = fixed(False)
    downsample_padding: int = fixed(1)
    flip_sin_to_cos: bool = fixed(True)
    freq_shift: int = fixed(0)
    mid_block_scale_factor: float = fixed(1)
    mid_block_type: str = fixed("UNetMidBlock2DCrossAttn")
    norm_eps: float = fixed(1e-05)
    _class_name: str = "UNet2DConditionModel"
    _diffusers_version: str = VERSION
    attention_head_dim: int | list[int] = whole(1024, default=8)  # the number of heads, despite its name in diffusers
    block_out_channels: list[int] = whole(8192)
    cross_attention_dim: int = whole(8192)
    down_block_types: list[str]
    in_channels: int = whole(64)
    layers_per_block: int = whole(MAX_LAYERS)
    norm_num_groups: int = whole(1024, default=32)
    out_channels: int = whole(64)
    sample_size: int = whole(4096)
    up_block_types: list[str] | None = None
    use_linear_projection: bool = False

    # Options of diffusers' network that Stable Diffusion 1 and 2 do not use, unless they are off when null, false or 0.
    UNUSED = {  # noqa: RUF012 - a constant
        "attention_type": "default",
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "resnet_out_scale_factor": 1.0,
        "resnet_time_scale_shift": "default",
        "time_embedding_type": "positional",
        "transformer_layers_per_block": 1,
    }
    IGNORED = ("addition_embed_type_num_heads", "upcast_attention")


class UNetLayout(DenoiserLayout[UNetConfig]):
    folder = "unet"
    classes = ("UNet2DConditionModel",)
    further_parts = {  # noqa: RUF012 - a constant
        "requires_safety_checker": False,
        **{name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")},
    }

    def to_json(self, config: UNetConfig, around: Surroundings) -> dict[str, Any]:
        down = [name for attends in config.attention_levels for name in BLOCKS if BLOCKS[name] == attends]
        return UNetJson(
            attention_head_dim=list(config.heads) if isinstance(config.heads, tuple) else config.heads,
            block_out_channels=list(config.block_out_channels),
            cross_attention_dim=around.context_width,
            down_block_types=down,
            in_channels=around.in_channels,
            layers_per_block=config.layers_per_block,
            norm_num_groups=config.norm_num_groups,
            out_channels=around.out_channels,
            sample_size=around.sample_size,
            up_block_types=mirrored(down),
            use_linear_projection=config.use_linear_projection,
        ).to_json()

    def from_json(self, content: dict[str, Any], *, source: Path) -> tuple[UNetConfig, Surroundings]:
        """Parse config.json. Raises ValueError for blocks that Stable Diffusion 1 and 2 do not have."""
        found = UNetJson.from_json(content, source=source)
        channels, outputs = found.in_channels, found.out_channels
        learned = outputs == 2 * channels
        latents = channels if learned else outputs
        if channels < latents:
            raise ValueError(f"{source} has in_channels {channels} and out_channels {outputs}: this is not supported")
        down, heads = found.down_block_types, found.attention_head_dim
        if unknown := [name for name in down if name not in BLOCKS]:
            raise ValueError(
                f"{source} has a {unknown[0]}, expected {' or '.join(BLOCKS)}: this U-Net is not supported"
            )
        if found.up_block_types not in (None, mirrored(down)):
            raise ValueError(f"{source} has up_block_types {found.up_block_types}, expected {mirrored(down)}")
        config = UNetConfig(
            block_out_channels=tuple(found.block_out_channels),
            layers_per_block=found.layers_per_block,
            attention_levels=tuple(BLOCKS[name] for name in down),
            heads=tuple(heads) if isinstance(heads, list) else heads,
            use_linear_projection=found.use_linear_projection,
            norm_num_groups=found.norm_num_groups,
        )
        side = int(found.sample_size)  # raises for a list of two sides
        return config, Surroundings(side, latents, found.cross_attention_dim, channels - latents, learned)

    def pipeline(self, *, for_inpainting: bool) -> str:
        return "StableDiffusionInpaintPipeline" if for_inpainting else "StableDiffusionPipeline"

    def call_words(self, *, size: int, context_length: int, for_inpainting: bool) -> str:
        return f", height={size}, width={size}" + ", image=image, mask_image=mask" * for_inpainting

    def other_names(self, network: Denoiser, config: UNetConfig) -> Mapping[str, str]:
        return {theirs: ours for ours, theirs in unet_modules(network, config).items()}


def mirrored(down_block_types: list[str]) -> list[str]:
    """Return the blocks on the way up that belong to those on the way down."""
    return [name.replace("Down", "Up") for name in reversed(down_block_types)]
