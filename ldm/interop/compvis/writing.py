"""Write Stable Diffusion to a single file in CompVis's layout.

The configuration is written to NAME.yaml next to NAME.safetensors, for programs that need one, and to the header.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.denoisers import UNetConfig
from ldm.diffusion import ScaledLinearBetaPath
from ldm.files.atomic import atomic_file
from ldm.interop.compvis.names import (
    OPEN_CLIP,
    OPEN_CLIP_LAYERS,
    TRANSFORMERS,
    is_attention_of_vae,
    lacks_unused_layer,
    unet_names,
    vae_names,
)
from ldm.interop.compvis.sidecar import HIDDEN_KEY, OWN_KEY, write_yaml
from ldm.interop.diffusers_layout.denoiser import UNetLayout
from ldm.interop.diffusers_layout.layout import Surroundings
from ldm.interop.diffusers_layout.scheduler import scheduler_config_json
from ldm.interop.diffusers_layout.vae import folded, scale_of, vae_config_json
from ldm.interop.identify import CONDITIONER, DENOISER, FIRST_STAGE
from ldm.interop.network_files import write_weights
from ldm.interop.ownership import ownership, section
from ldm.interop.published import published
from ldm.interop.weight_reader import open_weights
from ldm.model.components import ModelComponents
from text.conversion import prefixed_weights, text_encoder_config_json, transformers_to_open_clip
from text.encoder import OpenClipTextEncoder, TransformersTextEncoder
from text.tokenizer import clip_vocabulary

SUFFIX = ".safetensors"
ARCHITECTURES = {"Stable Diffusion 1": "stable-diffusion-v1", "Stable Diffusion 2": "stable-diffusion-v2"}


def write_single_file(
    parts: ModelComponents, path: Path, *, dtype: torch.dtype, check: Callable[[Path], object] | None = None
) -> None:
    """Write NAME.safetensors in CompVis's layout, and NAME.yaml. An older export of that name is replaced.

    check: called with the complete file before it takes its name; if it raises, nothing is replaced.

    Raises ValueError for a model that the layout, or the programs that read it, do not support.
    """
    check_target_file(path)
    title, path = path.stem, path.resolve()  # a link stays
    check_writable(parts)
    tensors = {name: tensor.detach().to("cpu", dtype) for name, tensor in single_file_tensors(parts).items()}
    config = ldm_config(parts)
    with atomic_file(path) as partial:
        write_weights(tensors, partial, header(parts, tensors, title=title))
        if check is not None:
            check(partial)
    write_yaml(config, path.with_suffix(".yaml"))


def check_target_file(path: Path) -> None:
    """Raise ValueError for a name without the suffix, and if the path exists and is not an older export."""
    if path.suffix != SUFFIX:
        raise ValueError(f"{path} does not end in {SUFFIX}, expected the name of a file that does")
    yaml_path = path.with_suffix(".yaml")
    older = path.is_file() and OWN_KEY in open_weights(path).metadata
    if (path.exists() or yaml_path.exists()) and not older:
        there = path if path.exists() else yaml_path
        raise ValueError(
            f"{there} exists and is not an export of this program: give a new name, or that of an older export"
        )


def check_writable(parts: ModelComponents) -> None:
    """Raise ValueError for a model that the layout, or the programs that read it, do not support."""
    model = parts.model
    if not isinstance(parts.config, UNetConfig):
        raise ValueError("a DiT has no single-file layout that other programs read: export it as a diffusers folder")
    if not isinstance(model.path, ScaledLinearBetaPath) or model.prediction not in ("eps", "v"):
        raise ValueError(
            f"a single file cannot express {model.prediction} on path {model.path.kind}, only eps and v on "
            "scaled_linear_beta: export a diffusers folder"
        )
    if len(model.conditioner.towers) > 1:
        raise ValueError("a single file holds one text encoder, but this model has more: export a diffusers folder")
    for part, widths in (("U-Net", parts.config.block_out_channels), ("VAE", model.vae.config.block_out_channels)):
        if any(width % widths[0] for width in widths):
            raise ValueError(
                f"the {part}'s widths {widths} are not multiples of the first, as the layout requires: export a "
                "diffusers folder"
            )
    if parts.model.conditioner.towers[0].tokenizer.to_json()["model"]["vocab"] != clip_vocabulary().ids:
        raise ValueError("a single file cannot hold a tokenizer other than CLIP's: export a diffusers folder")


def single_file_tensors(parts: ModelComponents) -> dict[str, Tensor]:
    """Return all weights under CompVis's names; a text encoder with gelu gets OpenCLIP's names, otherwise CLIP's."""
    assert isinstance(parts.config, UNetConfig)
    unet, vae = parts.denoiser.state_dict(), folded(parts.model.vae)
    autoencoder = vae.state_dict()
    found = {DENOISER + theirs: unet[ours] for ours, theirs in unet_names(unet, parts.config).items()}
    for ours, theirs in vae_names(autoencoder, vae.config).items():
        tensor = autoencoder[ours]
        found[FIRST_STAGE + theirs] = tensor[:, :, None, None] if is_attention_of_vae(theirs) else tensor
    # Markers that other programs look for, of settings that do not follow from shapes.
    marks = {"v_pred": parts.model.prediction == "v", "ztsnr": getattr(parts.model.path, "zero_terminal_snr", False)}
    found |= {name: torch.zeros(0) for name, is_so in marks.items() if is_so}
    return found | {CONDITIONER + name: tensor for name, tensor in conditioner_tensors(parts).items()}


def conditioner_tensors(parts: ModelComponents) -> dict[str, Tensor]:
    encoder = parts.model.conditioner.towers[0].encoder
    assert isinstance(encoder, OpenClipTextEncoder | TransformersTextEncoder)
    weights = prefixed_weights(encoder)
    if encoder.config.activation == "gelu":
        tensors = transformers_to_open_clip(weights)
        tensors |= unused_layer(tensors) if lacks_unused_layer(encoder.config) else {}
        return {OPEN_CLIP + name: tensor for name, tensor in tensors.items()}
    return {TRANSFORMERS + name: tensor for name, tensor in weights.items()}


def unused_layer(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of the last layer as the one that follows: other programs build OpenCLIP's tower with 24 layers, of
    which they do not use the last, and warn if it is missing. kohya's scripts write the same copy."""
    last, unused = (f"transformer.resblocks.{OPEN_CLIP_LAYERS - back}." for back in (2, 1))
    return {
        unused + name.removeprefix(last): tensor.clone() for name, tensor in tensors.items() if name.startswith(last)
    }


def header(parts: ModelComponents, tensors: Mapping[str, Tensor], *, title: str) -> dict[str, str]:
    """Build the header: modelspec (https://github.com/Stability-AI/ModelSpec, 1.0.1) for other programs, and our own
    configuration."""
    assert isinstance(parts.config, UNetConfig)
    model, width = parts.model, parts.model.conditioner.width
    side = parts.sample_size * model.vae.config.factor
    text = parts.model.conditioner.towers[0].encoder
    whose = ownership(parts).publish
    own = {
        "unet": UNetLayout().to_json(parts.config, Surroundings.of(parts.as_loaded)),
        "vae": vae_config_json(folded(model.vae).config),
        "text_encoder": text_encoder_config_json(text.config, whole=True) | {HIDDEN_KEY: text.config.hidden},
        "scheduler": scheduler_config_json(model.path, model.prediction, parts.scheduler),
    }
    kind = parts.config.describe(width)
    inpainting = "/inpainting" * parts.for_inpainting
    return {
        OWN_KEY: json.dumps(own),
        "foundry.notes": published(parts.notes, section(whose)),
        **({"foundry.credits": "\n\n".join(whose.credits)} if whose.credits else {}),
        **({"modelspec.license": whose.license} if whose.license else {}),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURES.get(kind, "stable-diffusion-v1") + inpainting,
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.title": title,
        "modelspec.date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "modelspec.resolution": f"{side}x{side}",
        **({"modelspec.encoder_layer": str(skip)} if (skip := text.config.unusual_clip_skip) else {}),
        "modelspec.prediction_type": {"eps": "epsilon", "v": "v"}[model.prediction],
        "modelspec.description": f"{kind}, written by Latent Foundry",
        "modelspec.hash_sha256": "0x" + hash_of_tensors(tensors),
    }


def hash_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the file without its header: of the tensors' bytes, in order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def ldm_config(parts: ModelComponents) -> dict[str, Any]:
    """Build CompVis's configuration. Other programs use its `target` names; this one ignores them."""
    model = parts.model
    assert isinstance(model.path, ScaledLinearBetaPath)
    params = {
        "linear_start": model.path.beta_start,
        "linear_end": model.path.beta_end,
        "timesteps": model.path.num_train_timesteps,
        "parameterization": model.prediction,
        "scale_factor": scale_of(folded(model.vae).config),
        "conditioning_key": "hybrid" if parts.for_inpainting else "crossattn",
        "cond_stage_key": "txt",
        "first_stage_key": "jpg",
        "image_size": parts.sample_size,
        "channels": model.vae.config.latent_channels,
        "use_ema": False,
        "unet_config": unet_section(parts),
        "first_stage_config": first_stage_section(parts),
        "cond_stage_config": cond_stage_section(parts),
    }
    kind = "LatentDiffusion"
    if parts.for_inpainting:
        kind = "LatentInpaintDiffusion"
        params["finetune_keys"] = None  # its default names weights to be extended, and asks for the file to extend
    return {"model": {"target": f"ldm.models.diffusion.ddpm.{kind}", "params": params}}


def unet_section(parts: ModelComponents) -> dict[str, Any]:
    config = parts.config
    assert isinstance(config, UNetConfig)
    first = config.block_out_channels[0]
    heads = {"num_heads": config.heads} if isinstance(config.heads, int) else {"num_head_channels": head_width(config)}
    # Only Stability's U-Net has this key; CompVis's accepts no other than its own, and reads version 1 alone.
    linear = {"use_linear_in_transformer": True} if config.use_linear_projection else {}
    params = {
        "image_size": parts.sample_size,
        "in_channels": parts.denoiser.in_channels,
        "out_channels": parts.model.vae.config.latent_channels,
        "model_channels": first,
        "attention_resolutions": [2**level for level, attends in enumerate(config.attention_levels) if attends],
        "num_res_blocks": config.layers_per_block,
        "channel_mult": [width // first for width in config.block_out_channels],
        **heads,
        "use_spatial_transformer": True,
        **linear,
        "transformer_depth": 1,
        "context_dim": parts.model.conditioner.width,
        "use_checkpoint": False,
        "legacy": False,
    }
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def head_width(config: UNetConfig) -> int:
    """Return the channels per head. Raises ValueError if they differ by level: CompVis has a single number."""
    widths = {width // heads for width, heads in zip(config.block_out_channels, config.heads_per_level, strict=True)}
    if len(widths) > 1:
        raise ValueError(f"heads {config.heads} are {sorted(widths)} wide, which a single file cannot express")
    return widths.pop()


def first_stage_section(parts: ModelComponents) -> dict[str, Any]:
    config = parts.model.vae.config
    first = config.block_out_channels[0]
    ddconfig = {
        "double_z": True,
        "z_channels": config.latent_channels,
        "resolution": parts.sample_size * config.factor,
        "in_channels": 3,
        "out_ch": 3,
        "ch": first,
        "ch_mult": [width // first for width in config.block_out_channels],
        "num_res_blocks": config.layers_per_block,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {"embed_dim": config.latent_channels, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}}
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


def cond_stage_section(parts: ModelComponents) -> dict[str, Any]:
    config = parts.model.conditioner.towers[0].encoder.config
    if config.activation == "gelu":
        # Of the tower's layers, among them the one that diffusers' folders lack: see unused_layer.
        hidden = "penultimate" if lacks_unused_layer(config) else config.hidden
        params = {"freeze": True, "layer": hidden}
        return {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder", "params": params}
    return {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
