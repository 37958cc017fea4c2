"""Read a standalone autoencoder, to replace a model's own: from a folder, or a file in either layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ldm.interop.compvis.names import as_matrix, is_attention_of_vae, vae_from_shapes, vae_names
from ldm.interop.compvis.reading import LEFT_OVER
from ldm.interop.diffusers_layout.vae import load_vae, with_new_names
from ldm.interop.identify import FIRST_STAGE, is_vae, refuse_foreign, shapes_of
from ldm.interop.network_files import described_by, fill
from ldm.interop.weight_reader import open_weights
from vae.autoencoder import AutoencoderKL, AutoencoderKLConfig


def read_vae(path: Path, *, dtype: torch.dtype, in_place_of: AutoencoderKLConfig) -> AutoencoderKL:
    """Read an autoencoder from a folder that holds its config.json, or a vae/ with one; or from a file.

    A file does not state the shift and scale of its latents: the model's own are used. Raises ValueError or
    FileNotFoundError for anything else, and for latents of another shape than the model's.
    """
    if path.is_dir():
        vae = load_vae(path if (path / "config.json").exists() else path / "vae", dtype=dtype)
    else:
        vae = _read_file(path, dtype=dtype, in_place_of=in_place_of)
    ours, theirs = in_place_of, vae.config
    if (ours.latent_channels, ours.factor) != (theirs.latent_channels, theirs.factor):
        raise ValueError(
            f"{path} makes latents of {theirs.latent_channels} channels at 1/{theirs.factor} of the image's side, "
            f"expected {ours.latent_channels} at 1/{ours.factor}, as the model's own does: give one that fits the model"
        )
    return vae


def _read_file(path: Path, *, dtype: torch.dtype, in_place_of: AutoencoderKLConfig) -> AutoencoderKL:
    weights = open_weights(path).changed(_own)
    shapes = shapes_of(weights.tensors)
    refuse_foreign(shapes, source=path)
    if not is_vae(shapes):
        raise ValueError(
            f"{path} is not an autoencoder ({', '.join(sorted(shapes)[:3])}): give one of Stable Diffusion's"
        )
    with described_by(path), torch.device("meta"):
        config = replace(vae_from_shapes(shapes), norm_num_groups=in_place_of.norm_num_groups)
        if config.latent_channels == in_place_of.latent_channels:
            config = replace(config, latent_mean=in_place_of.latent_mean, latent_std=in_place_of.latent_std)
        vae = AutoencoderKL(config)
    if any(".down_blocks." in name for name in shapes):
        fill(vae, weights.changed(with_new_names), dtype=dtype)
        return vae
    names = {theirs: ours for ours, theirs in vae_names(vae.state_dict(), config).items()}
    fill(vae, weights.changed(lambda found: {names.get(name, name): t for name, t in found.items()}), dtype=dtype)
    return vae


def _own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix, and the networks of the training loss."""
    kept = {name.removeprefix(FIRST_STAGE): tensor for name, tensor in tensors.items() if not _is_left_over(name)}
    return {name: as_matrix(tensor) if is_attention_of_vae(name) else tensor for name, tensor in kept.items()}


def _is_left_over(name: str) -> bool:
    return name.startswith("loss.") or LEFT_OVER.fullmatch(name) is not None
