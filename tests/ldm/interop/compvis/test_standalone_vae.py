"""An autoencoder in place of a model's own, in every layout that it comes in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.stable_diffusion import VAE, stirred
from safetensors.torch import save_file
from torch import Tensor

from ldm import DrawRequest, TextToImage
from ldm.interop.compvis.names import is_attention_of_vae, vae_names
from ldm.interop.diffusers_layout.folder import write_folder
from ldm.interop.diffusers_layout.vae import OLD_NAMES, save_vae
from ldm.interop.read_model import read_vae
from vae import AutoencoderKL, AutoencoderKLConfig

OWN = replace(VAE, latent_mean=(0.1, 0.0, 0.0, 0.0), latent_std=(1.0, 2.0, 3.0, 4.0))  # the model's


@pytest.fixture(scope="module")
def other() -> AutoencoderKL:
    network = stirred(AutoencoderKL(VAE), by=0.1, seed=5)
    assert isinstance(network, AutoencoderKL)
    return network


def compvis(vae: AutoencoderKL, prefix: str = "") -> dict[str, Tensor]:
    names = vae_names(vae.state_dict(), vae.config)
    return {
        prefix + theirs: (tensor[:, :, None, None] if is_attention_of_vae(theirs) else tensor).clone()
        for theirs, tensor in ((names[ours], tensor) for ours, tensor in vae.state_dict().items())
    }


def diffusers_alone(vae: AutoencoderKL) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in vae.state_dict().items()}


def diffusers_of_old(vae: AutoencoderKL) -> dict[str, Tensor]:
    names = {new: old for old, new in OLD_NAMES.items()}
    found = diffusers_alone(vae)
    for new, old in names.items():
        found = {name.replace(new, old) if "attentions" in name else name: t for name, t in found.items()}
    return found


FORMS = {
    "compvis": compvis,
    "compvis with its prefix": lambda vae: compvis(vae, "first_stage_model."),
    "compvis with what judged it": lambda vae: compvis(vae) | {"loss.logvar": torch.ones(()), "loss.a": torch.ones(2)},
    "diffusers": diffusers_alone,
    "diffusers of old": diffusers_of_old,
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_file_gives_the_networks_weights_and_keeps_the_models_statistics(other, form, suffix, tmp_path):
    tensors, path = FORMS[form](other), tmp_path / f"vae{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save({"state_dict": tensors}, path)
    found = read_vae(path, dtype=torch.float32, in_place_of=OWN)
    expected = other.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    assert found.config == OWN


@pytest.mark.parametrize("inner", ["", "vae"])
def test_a_folder_has_statistics_of_its_own(other, inner, tmp_path):
    save_vae(other, tmp_path / inner if inner else tmp_path)
    assert read_vae(tmp_path, dtype=torch.float32, in_place_of=OWN).config.latent_std == (1 / 0.18215,) * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_channels": 8}, r"makes latents of 8 channels at 1/4 .* expected 4 at 1/4"),
        ({"block_out_channels": (32, 64)}, r"makes latents of 4 channels at 1/2 .* expected 4 at 1/4"),
    ],
)
def test_latents_of_another_shape_are_refused(change, message, tmp_path):
    config = replace(AutoencoderKLConfig(block_out_channels=VAE.block_out_channels, layers_per_block=1), **change)
    save_file(compvis(AutoencoderKL(config)), tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=rf"vae\.safetensors {message}"):
        read_vae(tmp_path / "vae.safetensors", dtype=torch.float32, in_place_of=OWN)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_unet_a.lora_down.weight": torch.ones(2, 2)}, "looks like a LoRA, which is added to a model"),
        ({"conv_in.weight": torch.ones(2, 4, 3, 3)}, "is not an autoencoder"),
        ({"decoder.conv_in.weight": torch.ones(2, 4, 3, 3)}, "lacks the key 'post_quant_conv.weight'"),
    ],
)
def test_what_is_no_autoencoder(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match=rf"vae\.safetensors.* {message}"):
        read_vae(tmp_path / "vae.safetensors", dtype=torch.float32, in_place_of=OWN)


def test_one_tensor_missing(other, tmp_path):
    tensors = compvis(other)
    del tensors["decoder.norm_out.bias"]
    save_file(tensors, tmp_path / "vae.safetensors")
    with pytest.raises(
        ValueError, match=r"vae\.safetensors does not fit its config: 1 missing \(decoder\.conv_norm_out"
    ):
        read_vae(tmp_path / "vae.safetensors", dtype=torch.float32, in_place_of=OWN)


def test_a_model_draws_with_it(other, tmp_path: Path):
    from helpers.stable_diffusion import stable_diffusion

    write_folder(stable_diffusion(1), tmp_path / "model", dtype=torch.float32)
    save_file(compvis(other), tmp_path / "other.safetensors")
    request = DrawRequest(prompt="x", steps=2, scale=1.0, sampler="ddim", seed=1)
    own, swapped = (TextToImage.load(tmp_path / "model", vae=vae) for vae in (None, tmp_path / "other.safetensors"))
    assert "autoencoder of other.safetensors" in swapped.description and "autoencoder of" not in own.description
    assert (own.pixels(request) - swapped.pixels(request)).abs().max() > 0.01
    swapped.model.vae.load_state_dict(own.model.vae.state_dict())
    assert torch.equal(own.pixels(request), swapped.pixels(request))
