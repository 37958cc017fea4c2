"""Read and write denoisers in diffusers' layout: a folder with config.json and weights. Stable Diffusion's U-Net is
stored as unet/, a UNet2DConditionModel; the DiT as transformer/, a PixArtTransformer2DModel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldm.denoisers import Denoiser, DenoiserConfig, DiTConfig, UNetConfig
from ldm.interop.compvis.names import unet_modules
from ldm.interop.diffusers_layout.layout import OWN, VERSION, ConfigJson, DenoiserLayout, Surroundings, fixed, whole
from ldm.interop.network_files import MAX_LAYERS, described_by, fill, find_weights, read_config, write_network
from ldm.model.components import LoadedDenoiser

BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}  # on the way down; whether they have attention
MAX_TABLE = 2**25  # numbers in the table of positions; PixArt for 2048 x 2048 pixels has half as many


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

    # Options of diffusers' network that Stable Diffusion 1 and 2 do not use: these are off with the given value, those
    # of OPTIONS when null, false or 0.
    UNUSED = {  # noqa: RUF012 - a constant
        "attention_type": "default",
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "resnet_out_scale_factor": 1.0,
        "resnet_time_scale_shift": "default",
        "time_embedding_type": "positional",
        "transformer_layers_per_block": 1,
    }
    IGNORED = ("addition_embed_type_num_heads", "dropout", "upcast_attention")
    OPTIONS = (
        "addition_embed_type", "addition_time_embed_dim", "class_embed_type", "class_embeddings_concat",
        "cross_attention_norm", "dual_cross_attention", "encoder_hid_dim", "encoder_hid_dim_type",
        "mid_block_only_cross_attention", "num_attention_heads", "num_class_embeds", "only_cross_attention",
        "projection_class_embeddings_input_dim", "resnet_skip_time_act", "reverse_transformer_layers_per_block",
        "time_cond_proj_dim", "time_embedding_act_fn", "time_embedding_dim", "timestep_post_act",
    )  # fmt: skip
    ONE_OR_LIST = ("cross_attention_dim", "layers_per_block", "sample_size", "transformer_layers_per_block")


class UNetLayout(DenoiserLayout[UNetConfig]):
    folder = "unet"
    classes = ("UNet2DConditionModel",)
    pipelines = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
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
        if other := [name for name in down if name not in BLOCKS]:
            raise ValueError(f"{source} has a {other[0]}, expected {' or '.join(BLOCKS)}: this U-Net is not supported")
        if found.up_block_types not in (None, mirrored(down)):
            raise ValueError(f"{source} has up_block_types {found.up_block_types}, expected {mirrored(down)}")
        config = UNetConfig(
            block_out_channels=tuple(found.block_out_channels),
            layers_per_block=found.layers_per_block,
            attention_levels=tuple(BLOCKS[name] for name in down),
            heads=tuple(heads) if isinstance(heads, list) else heads,
            use_linear_projection=bool(found.use_linear_projection),
            norm_num_groups=found.norm_num_groups,
        )
        side = int(found.sample_size)  # raises for a list of two sides
        return config, Surroundings(side, latents, found.cross_attention_dim, channels - latents, learned)

    def call_words(self, *, size: int, context_length: int, for_inpainting: bool) -> str:
        sides = super().call_words(size=size, context_length=context_length, for_inpainting=for_inpainting)
        return sides + ", image=image, mask_image=mask" * for_inpainting

    def other_names(self, network: Denoiser, config: UNetConfig) -> Mapping[str, str]:
        return {theirs: ours for ours, theirs in unet_modules(network, config).items()}


def mirrored(down_block_types: list[str]) -> list[str]:
    """Return the blocks on the way up that belong to those on the way down."""
    return [name.replace("Down", "Up") for name in reversed(down_block_types)]


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
    IGNORED = ("dropout", "norm_num_groups", "upcast_attention")
    # Of the older class, Transformer2DModel.
    OPTIONS = ("num_vector_embeds", "use_linear_projection", "only_cross_attention", "double_self_attention")


class PixArtLayout(DenoiserLayout[DiTConfig]):
    folder = "transformer"
    classes = ("PixArtTransformer2DModel", "Transformer2DModel")  # the second before diffusers 0.29
    pipelines = ("PixArtAlphaPipeline",)
    call_note = (
        "All of these arguments are needed: the pipeline's defaults are for larger images and longer texts, and with "
        'the prompt alone it ends with "Invalid sample size".\n\n'
    )

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

    def call_words(self, *, size: int, context_length: int, for_inpainting: bool) -> str:
        """Pass sizes that disable the pipeline's defaults, which are for larger images and longer texts."""
        sides = f", height={size}, width={size}"
        return f"{sides}, max_sequence_length={context_length}, use_resolution_binning=False, clean_caption=False"


# A kind that is not listed here is stored in our own layout, which no other program opens.
LAYOUTS: dict[type[DenoiserConfig], DenoiserLayout[Any]] = {UNetConfig: UNetLayout(), DiTConfig: PixArtLayout()}
ALL_LAYOUTS = (*LAYOUTS.values(), OWN)


def layout_of(config: DenoiserConfig) -> DenoiserLayout[Any]:
    return LAYOUTS.get(type(config), OWN)


def save_denoiser(loaded: LoadedDenoiser, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Write config.json and the weights."""
    config = layout_of(loaded.config).to_json(loaded.config, Surroundings.of(loaded))
    write_network(loaded.network, config, folder, dtype=dtype)


def load_denoiser(folder: Path, *, dtype: torch.dtype = torch.float32) -> LoadedDenoiser:
    """Read a denoiser's network and configuration. Raises ValueError for anything else."""
    found = open_denoiser(folder)
    fill(found.network, find_weights(folder), dtype=dtype)
    return found


def open_denoiser(folder: Path) -> LoadedDenoiser:
    """Build the denoiser of meta tensors, from config.json alone; its weights are loaded later."""
    source = folder / "config.json"
    config, around = read_denoiser_config(source)
    with described_by(source), torch.device("meta"):
        return LoadedDenoiser(around.build(config), config, around.sample_size, around.context_width)


def read_denoiser_config(source: Path) -> tuple[DenoiserConfig, Surroundings]:
    """Read a denoiser's config.json. Raises ValueError for another kind of network."""
    content = read_config(source)
    kind = content.get("_class_name")
    for layout in ALL_LAYOUTS:
        if kind in layout.classes:
            with described_by(source):
                return layout.from_json(content, source=source)
    known = " or ".join(layout.classes[0] for layout in LAYOUTS.values())
    raise ValueError(f"{source} describes {kind!r}, expected {known}: give a denoiser's folder")
