"""Stable Diffusion's U-Net in diffusers' layout: unet/, a UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.denoisers import Denoiser, UNetConfig
from ldm.interop.compvis.names import unet_modules
from ldm.interop.diffusers_layout.layout import VERSION, DenoiserLayout, Surroundings
from ldm.interop.network_files import MAX_LAYERS, check_known, check_whole_numbers, refuse_other

# Fixed properties of these networks: with other values, the weights would load but compute something else.
ALWAYS = {
    "act_fn": "silu",
    "center_input_sample": False,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
}
OF_OTHERS: dict[str, Any] = {  # options of diffusers' network that Stable Diffusion 1 and 2 do not use
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
# The last two affect how it is computed, not the result.
REST = ("down_block_types", "up_block_types", "use_linear_projection", "addition_embed_type_num_heads",
             "upcast_attention")  # fmt: skip
LIMITS = {
    "attention_head_dim": 1024,
    "block_out_channels": 8192,
    "cross_attention_dim": 8192,
    "in_channels": 64,
    "layers_per_block": MAX_LAYERS,
    "norm_num_groups": 1024,
    "out_channels": 64,
    "sample_size": 4096,
}


class UNetLayout(DenoiserLayout[UNetConfig]):
    folder = "unet"
    classes = ("UNet2DConditionModel",)
    further_parts = {  # noqa: RUF012 - a constant
        "requires_safety_checker": False,
        **{name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")},
    }

    def to_json(self, config: UNetConfig, around: Surroundings) -> dict[str, Any]:
        down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in config.attention_levels]
        up = ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(config.attention_levels)]
        return ALWAYS | {
            "_class_name": self.classes[0],
            "_diffusers_version": VERSION,
            # The number of heads, despite its name in diffusers.
            "attention_head_dim": list(config.heads) if isinstance(config.heads, tuple) else config.heads,
            "block_out_channels": list(config.block_out_channels),
            "cross_attention_dim": around.context_width,
            "down_block_types": down,
            "in_channels": around.in_channels,
            "layers_per_block": config.layers_per_block,
            "norm_num_groups": config.norm_num_groups,
            "out_channels": around.out_channels,
            "sample_size": around.sample_size,
            "up_block_types": up,
            "use_linear_projection": config.use_linear_projection,
        }

    def from_json(self, content: dict[str, Any], *, source: Path) -> tuple[UNetConfig, Surroundings]:
        """Parse config.json. Raises ValueError for blocks that Stable Diffusion 1 and 2 do not have."""
        config = unet_config(content, source=source)
        channels, outputs = content["in_channels"], content["out_channels"]
        learned = outputs == 2 * channels
        latents = channels if learned else outputs
        if channels < latents:
            raise ValueError(f"{source} has in_channels {channels} and out_channels {outputs}: this is not supported")
        side, width = int(content["sample_size"]), content["cross_attention_dim"]
        return config, Surroundings(side, latents, width, channels - latents, learned)

    def pipeline(self, *, for_inpainting: bool) -> str:
        return "StableDiffusionInpaintPipeline" if for_inpainting else "StableDiffusionPipeline"

    def call_words(self, *, size: int, context_length: int, for_inpainting: bool) -> str:
        return f", height={size}, width={size}" + ", image=image, mask_image=mask" * for_inpainting

    def other_names(self, network: Denoiser, config: UNetConfig) -> Mapping[str, str]:
        return {theirs: ours for ours, theirs in unet_modules(network, config).items()}


def unet_config(content: dict[str, Any], *, source: Path) -> UNetConfig:
    """Convert diffusers' keys to our config. Raises ValueError for blocks that Stable Diffusion 1 and 2 do not have."""
    check_whole_numbers(content, LIMITS, source=source)
    refuse_other(content, ALWAYS | OF_OTHERS, source=source)
    check_known(content, (*ALWAYS, *OF_OTHERS, *LIMITS, *REST), source=source)
    known = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
    unknown = [name for name in content["down_block_types"] if name not in known]
    if unknown:
        raise ValueError(f"{source} has a {unknown[0]}, expected {' or '.join(known)}: this U-Net is not supported")
    mirrored = [name.replace("Down", "Up") for name in reversed(content["down_block_types"])]
    if content.get("up_block_types", mirrored) != mirrored:
        raise ValueError(f"{source} has up_block_types {content['up_block_types']}, expected {mirrored}")
    heads = content.get("attention_head_dim") or 8  # diffusers' default in files that do not state it
    return UNetConfig(
        block_out_channels=tuple(content["block_out_channels"]),
        layers_per_block=content["layers_per_block"],
        attention_levels=tuple(known[name] for name in content["down_block_types"]),
        heads=tuple(heads) if isinstance(heads, list) else heads,
        use_linear_projection=content.get("use_linear_projection", False),
        norm_num_groups=content.get("norm_num_groups") or 32,
    )
