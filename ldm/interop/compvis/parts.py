"""Bring a part of Stable Diffusion, alone in a file, to the names that it has in a complete single file.

A U-Net comes under CompVis's names or diffusers', a text encoder under transformers' or OpenCLIP's: ComfyUI's folders
diffusion_models/ and text_encoders/ hold such files, and so do those of trainers.
"""

from __future__ import annotations

import torch

from ldm.denoisers import UNet, UNetConfig
from ldm.interop.compvis.names import OPEN_CLIP, TRANSFORMERS, default_heads, unet_names
from ldm.interop.extra_tensors import modules_of
from ldm.interop.identify import CONDITIONER, DENOISER, Shapes, is_single_file, shapes_of, without_wrapping
from ldm.interop.network_files import MAX_LAYERS, MAX_LEVELS
from ldm.interop.weight_reader import Weights

UNET_MODULES = ("time_embed.", "input_blocks.", "middle_block.", "output_blocks.", "out.")  # CompVis's
DIFFUSERS_LAYER = "down_blocks.{}.resnets.{}.conv1.weight"


def as_single_file(weights: Weights) -> Weights:
    """Rename a U-Net alone. Other files stay as they are, but for what wraps all names.

    Raises KeyError with the name of a missing tensor, and ValueError for a network that no Stable Diffusion has.
    """
    weights = weights.changed(without_wrapping)
    shapes = shapes_of(weights.tensors)
    if is_single_file(shapes):
        return weights
    if "input_blocks.0.0.weight" in shapes:
        new = {name: DENOISER + name for name in shapes if name.startswith(UNET_MODULES)}
    elif DIFFUSERS_LAYER.format(0, 0) in shapes and "conv_in.weight" in shapes:
        new = _from_diffusers(shapes)
    else:
        return weights
    return weights.changed(lambda found: {new.get(name, name): tensor for name, tensor in found.items()})


def _from_diffusers(shapes: Shapes) -> dict[str, str]:
    """Map the names of a U-Net in diffusers' layout. Those that it does not have stay below the U-Net."""
    config, context_width = unet_from_diffusers(shapes)
    with torch.device("meta"):
        ours = UNet(config, latent_channels=4, concat_channels=0, context_width=context_width).state_dict()
    modules = tuple(modules_of(ours))
    below = {name: name for name in shapes if name.startswith(modules)} | unet_names(ours, config)
    return {name: DENOISER + theirs for name, theirs in below.items()}


def unet_from_diffusers(shapes: Shapes) -> tuple[UNetConfig, int]:
    """Derive a U-Net's configuration and context width from the shapes under diffusers' names: see unet_from_shapes."""
    levels = next(i for i in range(MAX_LEVELS + 1) if i == MAX_LEVELS or DIFFUSERS_LAYER.format(i, 0) not in shapes)
    layers = next(j for j in range(MAX_LAYERS + 1) if j == MAX_LAYERS or DIFFUSERS_LAYER.format(0, j) not in shapes)
    widths = tuple(shapes[DIFFUSERS_LAYER.format(level, 0)][0] for level in range(levels))
    linear = len(shapes["mid_block.attentions.0.proj_in.weight"]) == 2
    config = UNetConfig(
        block_out_channels=widths,
        layers_per_block=layers,
        attention_levels=tuple(f"down_blocks.{i}.attentions.0.norm.weight" in shapes for i in range(levels)),
        heads=default_heads(widths, linear=linear),
        use_linear_projection=linear,
    )
    return config, shapes["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"][1]


def with_text_encoder_names(weights: Weights) -> Weights:
    """Rename a text encoder alone. Other files stay as they are, but for what wraps all names."""
    weights = weights.changed(without_wrapping)
    names = set(weights.tensors)
    if any(name.startswith(CONDITIONER) for name in names):
        return weights
    is_open_clip = any(name.startswith("transformer.resblocks.") for name in names)
    prefix = CONDITIONER + (OPEN_CLIP if is_open_clip else TRANSFORMERS)
    return weights.changed(lambda found: {prefix + name: tensor for name, tensor in found.items()})
