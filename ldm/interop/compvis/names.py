"""Map the names of Stable Diffusion's parameters between ours, which are diffusers', and CompVis's single file.

Generic in the number of levels and of layers per level. One rule per network, from our name to CompVis's, gives both
directions.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm.denoisers import UNetConfig
from ldm.interop.identify import CONDITIONER, EMA, Shapes
from ldm.interop.network_files import MAX_LAYERS, MAX_LEVELS
from text.conversion import PREFIX, flattened, open_clip_to_transformers, transformers_to_open_clip
from text.encoder import TextEncoderConfig, TransformersTextEncoder
from text.tokenizer import EOS_ID
from vae.autoencoder import AutoencoderKLConfig

# Within one module: ours -> theirs.
RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_MIDDLE = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}
HEADS_OF_CONVOLUTIONAL, HEAD_WIDTH_OF_LINEAR = 8, 64  # Stable Diffusion 1 and 2: heads do not follow from shapes
ENCODER_BLOCK = re.compile(r"encoder\.(?:down|down_blocks)\.(\d+)\.(?:block|resnets)\.(\d+)\.conv2\.weight")
LONGEST = 200  # blocks on the way down
OPEN_CLIP, TRANSFORMERS = "model.", "transformer."  # prefixes of the text encoder's names
HEAD_WIDTH = 64  # of every CLIP; it does not follow from any shape
OPEN_CLIP_WIDTH = 1024  # of Stable Diffusion 2, in either layout
# Tensors whose shapes give the positions, the tokens and the width within a layer; and the pattern of layer names.
OPEN_CLIP_NAMES = (
    "positional_embedding",
    "token_embedding.weight",
    "transformer.resblocks.0.mlp.c_fc.weight",
    re.compile(r"transformer\.resblocks\.(\d+)\."),
)
TRANSFORMERS_NAMES = (
    "embeddings.position_embedding.weight",
    "embeddings.token_embedding.weight",
    "encoder.layers.0.mlp.fc1.weight",
    re.compile(r"encoder\.layers\.(\d+)\."),
)
MAX_TEXT_LAYERS = 256  # limit, since the layers are built before the weights are compared
OPEN_CLIP_LAYERS = 24  # if all are present, the last is not used: Stable Diffusion 2 takes the states before it


def unet_names(ours: Iterable[str], config: UNetConfig) -> dict[str, str]:
    """Map our parameters' names to CompVis's, below model.diffusion_model."""
    return {name: _unet_name(name, config) for name in ours}


def unet_modules(unet: nn.Module, config: UNetConfig) -> dict[str, str]:
    """Map our names to CompVis's for modules with parameters, which LoRAs refer to."""
    names = unet_names(unet.state_dict(), config)
    return {ours.rpartition(".")[0]: theirs.rpartition(".")[0] for ours, theirs in names.items()}


def _unet_name(name: str, config: UNetConfig) -> str:
    per_level = config.layers_per_block + 1
    for end, theirs in UNET_ENDS.items():
        if name.startswith(f"{end}."):
            return theirs + name.removeprefix(end)
    if match := re.fullmatch(r"mid_block\.resnets\.(\d)\.(\w+)\.(.+)", name):
        return f"middle_block.{2 * int(match[1])}.{RES_BLOCK[match[2]]}.{match[3]}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name)
    if match is None:
        raise KeyError(name)
    level, kind, index, rest = int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{per_level * (level + 1)}.0.{rest.replace('conv.', 'op.')}"
    if kind == "upsamplers":  # after the level's last layers: a ResBlock, and an attention if the level has any
        attends = config.attention_levels[len(config.attention_levels) - 1 - level]
        return f"output_blocks.{per_level * (level + 1) - 1}.{1 + attends}.{rest}"
    block = f"input_blocks.{per_level * level + index + 1}" if match[1] == "down" else ""
    block = block or f"output_blocks.{per_level * level + index}"
    if kind == "attentions":
        return f"{block}.1.{rest}"
    layer, _, parameter = rest.partition(".")
    return f"{block}.0.{RES_BLOCK[layer]}.{parameter}"


def ema_name(theirs: str) -> str:
    """Return the name of the average of a parameter under model.diffusion_model.: CompVis removes all dots."""
    return EMA + f"diffusion_model.{theirs}".replace(".", "")


def vae_names(ours: Iterable[str], config: AutoencoderKLConfig) -> dict[str, str]:
    """Map our parameters' names to CompVis's, below first_stage_model."""
    return {name: _vae_name(name, len(config.block_out_channels)) for name in ours}


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name)
    for ours, theirs in VAE_MIDDLE.items():
        name = name.replace(f"{ours}.", f"{theirs}.")
    return name


def is_attention_of_vae(theirs: str) -> bool:
    """Return whether it is a matrix that CompVis stores as a 1 x 1 convolution."""
    return re.fullmatch(r"(en|de)coder\.mid\.attn_1\.(q|k|v|proj_out)\.weight", theirs) is not None


def unet_from_shapes(shapes: Shapes) -> tuple[UNetConfig, int]:
    """Derive a U-Net's configuration and context width from the shapes under CompVis's names.

    Attention heads and normalisation groups do not follow from shapes: Stable Diffusion's are used. Raises KeyError
    with the name of a missing parameter, and ValueError for another kind of network.
    """
    levels: list[list[tuple[int, bool]]] = [[]]  # layers per level: width, and whether it has attention
    for i in range(1, LONGEST):
        if f"input_blocks.{i}.0.op.weight" in shapes:
            levels.append([])
        elif weight := shapes.get(f"input_blocks.{i}.0.in_layers.2.weight"):
            levels[-1].append((weight[0], f"input_blocks.{i}.1.norm.weight" in shapes))
        else:
            break
    if len(levels) > MAX_LEVELS or len(levels[0]) > MAX_LAYERS:
        raise ValueError(f"it has {len(levels)} levels of {len(levels[0])} layers, which no Stable Diffusion has")
    if len({len(level) for level in levels}) != 1 or any(len(set(level)) != 1 for level in levels):
        raise ValueError(f"its levels are {levels} (width, attention), which no Stable Diffusion has")
    widths = tuple(level[0][0] for level in levels)
    projection = shapes["middle_block.1.proj_in.weight"]
    linear = len(projection) == 2
    config = UNetConfig(
        block_out_channels=widths,
        layers_per_block=len(levels[0]),
        attention_levels=tuple(level[0][1] for level in levels),
        heads=default_heads(widths, linear=linear),
        use_linear_projection=linear,
    )
    return config, shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1]


def default_heads(widths: tuple[int, ...], *, linear: bool) -> int | tuple[int, ...]:
    return tuple(max(1, width // HEAD_WIDTH_OF_LINEAR) for width in widths) if linear else HEADS_OF_CONVOLUTIONAL


def vae_from_shapes(shapes: Shapes) -> AutoencoderKLConfig:
    """Derive an autoencoder's configuration from the shapes under CompVis's or diffusers' names, with Stable
    Diffusion's scale.

    Raises KeyError with the name of a missing parameter, and ValueError for another kind of network.
    """
    blocks = [(match, name) for name in shapes if (match := ENCODER_BLOCK.fullmatch(name))]
    widths = {int(match[1]): shapes[name][0] for match, name in blocks}
    layers = 1 + max((int(match[2]) for match, _ in blocks), default=-1)
    if sorted(widths) != list(range(len(widths))) or len(widths) > MAX_LEVELS or layers > MAX_LAYERS:
        raise ValueError(f"its encoder has {len(widths)} levels of {layers} layers, which no autoencoder has")
    return AutoencoderKLConfig(
        block_out_channels=tuple(widths[level] for level in sorted(widths)),
        layers_per_block=layers,
        latent_channels=shapes["post_quant_conv.weight"][0],
    )


class TextEncoderPlan(NamedTuple):
    """How a file stores the text encoder."""

    config: TextEncoderConfig
    wanted: dict[str, Tensor]  # names below cond_stage_model., and shapes (meta tensors), that it must have
    is_open_clip: bool

    def is_unused(self, name: str) -> bool:
        """Return whether this tensor, named as in `wanted`, is of the layer that such files have and no program uses,
        where the configuration leaves it out."""
        unused = f"{OPEN_CLIP}transformer.resblocks.{self.config.layers}."
        return self.is_open_clip and lacks_unused_layer(self.config) and name.startswith(unused)

    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the file's weights to those of CLIPTextModel, as views."""
        prefix = OPEN_CLIP if self.is_open_clip else TRANSFORMERS
        own = {name.removeprefix(prefix): tensors[CONDITIONER + name] for name in self.wanted}
        return open_clip_to_transformers(own) if self.is_open_clip else flattened(own)


def lacks_unused_layer(config: TextEncoderConfig) -> bool:
    """Return whether this is OpenCLIP's tower without its last layer, as diffusers stores it: its states come from the
    layer before."""
    return config.hidden == "last" and config.layers == OPEN_CLIP_LAYERS - 1


def plan_text_encoder(shapes: Shapes, stated: TextEncoderConfig | None) -> TextEncoderPlan:
    """Plan how to load the text encoder. stated: the file's configuration; None: derive it from the shapes and
    Stable Diffusion's conventions.

    Raises ValueError for anything but CLIP, and KeyError with the name of a missing tensor.
    """
    is_open_clip = any(name.startswith(OPEN_CLIP) for name in shapes)
    if not is_open_clip and not any(".encoder.layers." in f".{name}" for name in shapes):
        known = sorted(shapes)[:3]
        raise ValueError(f"its text encoder is not a CLIP (cond_stage_model. has {', '.join(known) or 'nothing'})")
    prefix = OPEN_CLIP if is_open_clip else TRANSFORMERS
    if not is_open_clip and any(name.startswith(f"{TRANSFORMERS}{PREFIX}") for name in shapes):
        prefix = f"{TRANSFORMERS}{PREFIX}"
    config = stated or _from_shapes({name.removeprefix(prefix): shape for name, shape in shapes.items()}, is_open_clip)
    with torch.device("meta"):
        state = TransformersTextEncoder(config).model.state_dict()
    own = transformers_to_open_clip(state) if is_open_clip else flattened(state)
    return TextEncoderPlan(config, {prefix + name: tensor for name, tensor in own.items()}, is_open_clip)


def _from_shapes(shapes: Shapes, is_open_clip: bool) -> TextEncoderConfig:
    """Derive the configuration; names have no prefix. A tower of OpenCLIP's width is OpenCLIP's under either names."""
    positions, tokens, hidden, layer = OPEN_CLIP_NAMES if is_open_clip else TRANSFORMERS_NAMES
    length, width = shapes[positions]
    found = [int(match[1]) for name in shapes if (match := layer.match(name))]
    layers = min(1 + max(found, default=0), MAX_TEXT_LAYERS)
    is_second = is_open_clip or width == OPEN_CLIP_WIDTH
    return TextEncoderConfig(
        width=width,
        layers=layers,
        heads=max(1, width // HEAD_WIDTH),
        intermediate_size=shapes[hidden][0],
        context_length=length,
        vocab_size=shapes[tokens][0],
        activation="gelu" if is_second else "quick_gelu",
        hidden="penultimate" if is_second and layers == OPEN_CLIP_LAYERS else "last",
        projection_dim=None,
        pad_id=0 if is_second else EOS_ID,
    )
