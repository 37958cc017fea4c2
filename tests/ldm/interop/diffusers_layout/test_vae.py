"""The autoencoder's folder: diffusers opens it, we open diffusers', and folding changes nothing seen."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.files.strict_json import read_json, write_json
from ldm.interop.diffusers_layout.vae import folded, load_vae, save_vae, vae_config, vae_config_json
from ldm.interop.network_files import write_weights
from ldm.interop.weight_reader import open_weights
from vae import AutoencoderKL, AutoencoderKLConfig

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

CONFIG = AutoencoderKLConfig(block_out_channels=(16, 24, 32), layers_per_block=1, norm_num_groups=8)
MEASURED = dataclasses.replace(CONFIG, latent_mean=(0.5, -1.0, 2.0, 0.0), latent_std=(0.3, 4.0, 1.0, 2.5))


def lively_vae(config: AutoencoderKLConfig) -> AutoencoderKL:
    """Random weights that leave none of them at a value that hides a mistake."""
    torch.manual_seed(0)
    vae = AutoencoderKL(config)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return vae.eval()


@pytest.fixture
def vae() -> AutoencoderKL:
    return lively_vae(MEASURED)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def diffusers_vae(folder: Path) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Theirs

    return Theirs.from_pretrained(folder, local_files_only=True).eval()


@torch.no_grad()
def test_diffusers_opens_our_folder_and_we_open_its(vae: AutoencoderKL, tmp_path: Path):
    save_vae(vae, tmp_path / "ours")
    theirs = diffusers_vae(tmp_path / "ours")
    assert theirs.state_dict().keys() == vae.state_dict().keys()
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in theirs.state_dict().items())
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_vae(tmp_path / "theirs")
    assert back.config == vae.config
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in back.state_dict().items())


@torch.no_grad()
def test_an_autoencoder_made_by_diffusers_is_opened(tmp_path: Path, pixels: torch.Tensor):
    """With its own scale and shift of the latents."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Theirs

    shape = {"block_out_channels": [8, 16], "latent_channels": 3, "norm_num_groups": 4}
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    theirs: Any = Theirs.from_config(shape | blocks | {"scaling_factor": 0.7, "shift_factor": 0.2})
    theirs.eval()
    theirs.save_pretrained(tmp_path)
    ours = load_vae(tmp_path)
    latents = ours.encode(pixels).mean
    expected = (theirs.encode(pixels).latent_dist.mean - 0.2) * 0.7
    assert (latents - expected).abs().max() <= 1e-5
    assert (ours.decode(latents) - theirs.decode(latents / 0.7 + 0.2).sample).abs().max() <= 1e-5


@torch.no_grad()
def test_statistics_and_scale_are_read_as_diffusers_pipelines_read_them(vae: AutoencoderKL, tmp_path: Path):
    """z = latents * latents_std / scaling_factor + latents_mean, where both are given."""
    save_vae(vae, tmp_path)
    latents = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(2))
    for scaling_factor in (None, 0.5):
        if scaling_factor is not None:
            write_json(
                read_json(tmp_path / "config.json") | {"scaling_factor": scaling_factor},
                tmp_path / "config.json",
            )
        theirs = diffusers_vae(tmp_path)
        mean, std = (torch.tensor(theirs.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
        expected = theirs.decode(latents * std / theirs.config.scaling_factor + mean).sample
        assert (load_vae(tmp_path).decode(latents) - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_files_with_the_attention_layers_old_names_are_opened(vae: AutoencoderKL, tmp_path: Path):
    """As Stable Diffusion 1.5 has them; diffusers itself renames them."""
    save_vae(vae, tmp_path)
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in open_weights(tmp_path / WEIGHTS_NAME).tensors.items():
        for new, before in names.items():
            name = name.replace(f".{new}.", f".{before}.")
        old[name] = tensor.clone()
    assert sum("proj_attn" in name for name in old) == 4
    write_weights(old, tmp_path / WEIGHTS_NAME)
    state = vae.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in diffusers_vae(tmp_path).state_dict().items())
    assert all(torch.equal(value, state[name]) for name, value in load_vae(tmp_path).state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("config", [MEASURED, CONFIG, dataclasses.replace(CONFIG, latent_mean=(1.0, 2.0, 3.0, 4.0))])
def test_what_is_saved_is_loaded(config: AutoencoderKLConfig, tmp_path: Path, pixels: torch.Tensor):
    vae = lively_vae(config)
    save_vae(vae, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", WEIGHTS_NAME]
    back = load_vae(tmp_path)
    latents = vae.encode(pixels)
    assert torch.allclose(back.encode(pixels).mean, latents.mean, rtol=1e-6)
    assert torch.allclose(back.encode(pixels).logvar, latents.logvar, atol=1e-5)
    assert torch.allclose(back.decode(latents.mean), vae.decode(latents.mean), atol=1e-6)


def test_half_precision_is_written_and_read_back_in_float32(vae: AutoencoderKL, tmp_path: Path):
    save_vae(vae, tmp_path, dtype=torch.bfloat16)
    assert {value.dtype for value in open_weights(tmp_path / WEIGHTS_NAME).tensors.values()} == {torch.bfloat16}
    for name, value in load_vae(tmp_path).state_dict().items():
        assert torch.equal(value, vae.state_dict()[name].bfloat16().float())


@torch.no_grad()
def test_folding_changes_neither_latents_nor_pixels(vae: AutoencoderKL, pixels: torch.Tensor):
    other = folded(vae)
    before, after = vae.encode(pixels), other.encode(pixels)
    assert (other.config.latent_mean, other.config.latent_std) == (None, None)
    assert (after.mean - before.mean).abs().max() <= 1e-5
    assert (after.logvar - before.logvar).abs().max() <= 1e-5
    latents = torch.randn(before.mean.shape, generator=torch.Generator().manual_seed(3))
    assert (other.decode(latents) - vae.decode(latents)).abs().max() <= 1e-5
    # And it did something: z itself lies elsewhere now.
    assert (other.posterior(pixels).mean - vae.posterior(pixels).mean).abs().max() > 0.1


@torch.no_grad()
def test_folding_leaves_the_original_alone_and_twice_is_once(vae: AutoencoderKL, pixels: torch.Tensor):
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    once = folded(vae)
    assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items()) and vae.config == MEASURED
    assert (
        folded(once).decode_z(pixels[:, :1].repeat(1, 4, 1, 1)) - once.decode_z(pixels[:, :1].repeat(1, 4, 1, 1))
    ).abs().max() <= 1e-6


@torch.no_grad()
def test_diffusers_scaled_latents_of_a_folded_autoencoder_are_ours(
    vae: AutoencoderKL, tmp_path: Path, pixels: torch.Tensor
):
    """Its Stable Diffusion pipeline knows one number: latents = z * scaling_factor."""
    save_vae(folded(vae), tmp_path)
    theirs = diffusers_vae(tmp_path)
    assert theirs.config.scaling_factor == 0.18215
    assert theirs.config.latents_mean is None and theirs.config.latents_std is None
    latents = theirs.encode(pixels).latent_dist.mean * theirs.config.scaling_factor
    assert (latents - vae.encode(pixels).mean).abs().max() <= 1e-5
    assert (theirs.decode(latents / theirs.config.scaling_factor).sample - vae.decode(latents)).abs().max() <= 1e-5


def test_the_config_has_every_key_that_diffusers_asks_for(tmp_path: Path, vae: AutoencoderKL):
    save_vae(vae, tmp_path)
    theirs = diffusers_vae(tmp_path).config
    content = vae_config_json(vae.config)
    for name, value in content.items():
        if not name.startswith("_diffusers"):
            found = (
                theirs["_class_name"] if name == "_class_name" and "_class_name" in theirs else theirs.get(name, value)
            )
            assert (list(found) if isinstance(found, (list, tuple)) else found) == value, name
    assert not {name for name in theirs if not name.startswith("_")} - content.keys()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"_class_name": "UNet2DConditionModel"},
            "describes 'UNet2DConditionModel', expected 'AutoencoderKL'",
        ),
        ({"_class_name": None}, "describes None, expected 'AutoencoderKL'"),
        ({"norm_num_groups": None, "latent_channels": None}, "lacks the key 'latent_channels'"),
    ],
)
def test_a_config_of_something_else_is_named(change: dict[str, Any], told: str, tmp_path: Path):
    content = vae_config_json(CONFIG) | change
    with pytest.raises(ValueError, match=f"config.json {told}"):
        vae_config(
            {key: value for key, value in content.items() if value is not None},
            source=tmp_path / "config.json",
        )


def test_weights_of_another_shape_are_named(vae: AutoencoderKL, tmp_path: Path):
    save_vae(vae, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"layers_per_block": 2}))
    with pytest.raises(ValueError, match=rf"{WEIGHTS_NAME} does not fit its config: \d+ missing"):
        load_vae(tmp_path)


def test_an_encoder_without_attention_is_refused(vae: AutoencoderKL, tmp_path: Path):
    """diffusers can leave out the mid block's attention; here its weights are then missing."""
    save_vae(vae, tmp_path)
    weights = {name: value for name, value in vae.state_dict().items() if "attentions" not in name}
    write_weights(weights, tmp_path / WEIGHTS_NAME)
    with pytest.raises(ValueError, match=r"20 missing \(decoder.mid_block.attentions.0.group_norm.bias"):
        load_vae(tmp_path)


@pytest.mark.parametrize(
    "change", [{"block_out_channels": 8}, {"latents_std": ["a"] * 4}, {"scaling_factor": 0}, {"layers_per_block": "2"}]
)
def test_a_config_with_a_value_of_another_kind_names_the_file(change: dict[str, Any], tmp_path: Path):
    save_vae(AutoencoderKL(CONFIG), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(vae_config_json(CONFIG) | change))
    with pytest.raises(
        ValueError, match=r"config\.json (holds a value of another|has (layers_per_block|scaling_factor) .,? exp)"
    ):
        load_vae(tmp_path)
