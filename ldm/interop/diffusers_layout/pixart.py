"""The DiT in diffusers' layout: transformer/, a PixArtTransformer2DModel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.denoisers import DiTConfig
from ldm.interop.diffusers_layout.layout import VERSION, DenoiserLayout, Surroundings
from ldm.interop.diffusers_layout.schema import ConfigJson, fixed, whole

MAX_TABLE = 2**25  # numbers in the table of positions; PixArt for 2048 x 2048 pixels has half as many


@dataclass(frozen=True, kw_only=True)
class PixArtJson(ConfigJson):
    """The keys of transformer/config.json."""

    activation_fn: str = fixed("gelu-approximate")
    attention_bias: bool = fixed(True)
    norm_elementwise_affine: bool = fixed(False)
    norm_eps: float = fixed(1e-06)
    norm_type: str = fixed("ada_norm_single")
    num_embeds_ada_norm: int = fixed(1000)
    use_additional_conditions: bool = fixed(False)
    _class_name: str = "PixArtTransformer2DModel"
    _diffusers_version: str = VERSION
    attention_head_dim: int = whole(512)
    caption_channels: int = whole(8192)
    cross_attention_dim: int | None = None
    in_channels: int = whole(64)
    interpolation_scale: float | None = None
    num_attention_heads: int = whole(128)
    num_layers: int = whole(256)
    out_channels: int | None = whole(128, default=None)
    patch_size: int = whole(64)
    sample_size: int = whole(1024)

    UNUSED = {"attention_type": "default"}  # noqa: RUF012 - a constant
    IGNORED = ("norm_num_groups", "upcast_attention")


class PixArtLayout(DenoiserLayout[DiTConfig]):
    folder = "transformer"
    classes = ("PixArtTransformer2DModel", "Transformer2DModel")  # the second before diffusers 0.29

    def to_json(self, config: DiTConfig, around: Surroundings) -> dict[str, Any]:
        return PixArtJson(
            attention_head_dim=config.width // config.heads,
            caption_channels=around.context_width,
            cross_attention_dim=config.width,
            in_channels=around.in_channels,
            interpolation_scale=config.position_scale,
            num_attention_heads=config.heads,
            num_layers=config.depth,
            out_channels=around.out_channels,
            patch_size=config.patch_size,
            sample_size=config.sample_size,
        ).to_json()

    def from_json(self, content: dict[str, Any], *, source: Path) -> tuple[DiTConfig, Surroundings]:
        """Parse config.json. Raises ValueError for settings that PixArt does not have."""
        found = PixArtJson.from_json(content, source=source)
        width = found.num_attention_heads * found.attention_head_dim
        tokens = (found.sample_size // found.patch_size) ** 2
        if tokens * width > MAX_TABLE:
            raise ValueError(
                f"{source} has sample_size {found.sample_size} and patch_size {found.patch_size}: the table of "
                f"{tokens} positions would be too large"
            )
        channels, outputs = found.in_channels, found.out_channels or found.in_channels
        if outputs not in (channels, 2 * channels):
            raise ValueError(f"{source} has in_channels {channels} and out_channels {outputs}: this is not supported")
        config = DiTConfig(
            depth=found.num_layers,
            width=width,
            heads=found.num_attention_heads,
            sample_size=found.sample_size,
            patch_size=found.patch_size,
            interpolation_scale=found.interpolation_scale,
        )
        learned = outputs == 2 * channels
        return config, Surroundings(found.sample_size, channels, found.caption_channels, learned_variance=learned)

    def pipeline(self, *, for_inpainting: bool) -> str:
        return "PixArtAlphaPipeline"

    def call_words(self, *, size: int, context_length: int, for_inpainting: bool) -> str:
        """Pass sizes that disable the pipeline's defaults, which are for larger images and longer texts."""
        sides = f", height={size}, width={size}"
        return f"{sides}, max_sequence_length={context_length}, use_resolution_binning=False, clean_caption=False"
