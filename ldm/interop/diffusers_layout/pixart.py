"""The DiT in diffusers' layout: transformer/, a PixArtTransformer2DModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.denoisers import DiTConfig
from ldm.interop.diffusers_layout.layout import VERSION, DenoiserLayout, Surroundings
from ldm.interop.network_files import check_known, check_whole_numbers, refuse_other

# Fixed properties of this network: with other values, the weights would load but compute something else.
ALWAYS = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000,
    "use_additional_conditions": False,
}
LIMITS = {
    "attention_head_dim": 512,
    "caption_channels": 8192,
    "in_channels": 64,
    "num_attention_heads": 128,
    "num_layers": 256,
    "out_channels": 128,
    "patch_size": 64,
    "sample_size": 1024,
}
OF_OTHERS = {"dropout": 0.0, "attention_type": "default"}
REST = ("cross_attention_dim", "interpolation_scale", "norm_num_groups", "upcast_attention")
MAX_TABLE = 2**25  # numbers in the table of positions; PixArt for 2048 x 2048 pixels has half as many


class PixArtLayout(DenoiserLayout[DiTConfig]):
    folder = "transformer"
    classes = ("PixArtTransformer2DModel", "Transformer2DModel")  # the second before diffusers 0.29

    def to_json(self, config: DiTConfig, around: Surroundings) -> dict[str, Any]:
        return ALWAYS | {
            "_class_name": self.classes[0],
            "_diffusers_version": VERSION,
            "attention_head_dim": config.width // config.heads,
            "caption_channels": around.context_width,
            "cross_attention_dim": config.width,
            "in_channels": around.in_channels,
            "interpolation_scale": config.position_scale,
            "num_attention_heads": config.heads,
            "num_layers": config.depth,
            "out_channels": around.out_channels,
            "patch_size": config.patch_size,
            "sample_size": config.sample_size,
        }

    def from_json(self, content: dict[str, Any], *, source: Path) -> tuple[DiTConfig, Surroundings]:
        """Parse config.json. Raises ValueError for settings that PixArt does not have."""
        config = dit_config(content, source=source)
        channels = content["in_channels"]
        outputs = content.get("out_channels") or channels
        if outputs not in (channels, 2 * channels):
            raise ValueError(f"{source} has in_channels {channels} and out_channels {outputs}: this is not supported")
        learned = outputs == 2 * channels
        around = Surroundings(config.sample_size, channels, content["caption_channels"], learned_variance=learned)
        return config, around

    def pipeline(self, *, for_inpainting: bool) -> str:
        return "PixArtAlphaPipeline"

    def call_words(self, *, size: int, context_length: int, for_inpainting: bool) -> str:
        """Pass sizes that disable the pipeline's defaults, which are for larger images and longer texts."""
        sides = f", height={size}, width={size}"
        return f"{sides}, max_sequence_length={context_length}, use_resolution_binning=False, clean_caption=False"


def dit_config(content: dict[str, Any], *, source: Path) -> DiTConfig:
    """Convert diffusers' keys to our config. Raises ValueError for settings that PixArt does not have."""
    check_whole_numbers(content, LIMITS, source=source)
    refuse_other(content, ALWAYS | OF_OTHERS, source=source)
    check_known(content, (*ALWAYS, *OF_OTHERS, *LIMITS, *REST), source=source)
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
