"""The autoencoder against diffusers' AutoencoderKL, and what it promises of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from vae import AutoencoderKL, AutoencoderKLConfig

SHAPES = {
    "f4, one layer": AutoencoderKLConfig(block_out_channels=(16, 24, 32), layers_per_block=1, norm_num_groups=8),
    "f8, two layers": AutoencoderKLConfig(
        block_out_channels=(8, 16, 24, 24), layers_per_block=2, latent_channels=3, norm_num_groups=4
    ),
}


def lively(network: torch.nn.Module) -> None:
    """Move every parameter, so that none of them (a norm's bias, say) is at a value that hides a mistake."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def pictures(height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(params=SHAPES, scope="module")
def pair(request: pytest.FixtureRequest) -> tuple[AutoencoderKL, Any]:
    """Ours and diffusers', with the same weights."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Theirs

    config = SHAPES[request.param]
    levels = len(config.block_out_channels)
    shape = dataclasses.asdict(config) | {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    theirs: Any = Theirs.from_config({key: value for key, value in shape.items() if value is not None})
    theirs.eval()
    lively(theirs)
    ours = AutoencoderKL(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@torch.no_grad()
def test_moments_are_those_of_diffusers(pair: tuple[AutoencoderKL, Any]):
    ours, theirs = pair
    for size in ((32, 32), (16, 40)):
        q, expected = ours.posterior(pictures(*size)), theirs.encode(pictures(*size)).latent_dist
        assert q.mean.std() > 0.05  # the comparison says something
        assert (q.mean - expected.mean).abs().max() <= 1e-5
        assert (q.logvar - expected.logvar).abs().max() <= 1e-5
        assert q.mean.shape == (
            2,
            ours.config.latent_channels,
            *(side // ours.config.factor for side in size),
        )


@torch.no_grad()
def test_pixels_are_those_of_diffusers(pair: tuple[AutoencoderKL, Any]):
    ours, theirs = pair
    z = torch.randn(2, ours.config.latent_channels, 5, 4, generator=torch.Generator().manual_seed(2))
    assert ours.decode_z(z).std() > 0.05
    assert (ours.decode_z(z) - theirs.decode(z).sample).abs().max() <= 1e-5
    latents = (0.18215 * z).float()  # without statistics of its own, Stable Diffusion's scale
    assert (ours.decode(latents) - theirs.decode(z).sample).abs().max() <= 1e-4
    assert ours.decode(latents).shape == (2, 3, 5 * ours.config.factor, 4 * ours.config.factor)


def test_parameters_are_those_of_diffusers(pair: tuple[AutoencoderKL, Any]):
    ours, theirs = (network.state_dict() for network in pair)
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in theirs.items()}


def test_factor_is_two_to_the_levels():
    assert [SHAPES[name].factor for name in SHAPES] == [4, 8]
    assert AutoencoderKLConfig().factor == 8


@torch.no_grad()
def test_a_training_pass_is_encode_sample_decode(pair: tuple[AutoencoderKL, Any]):
    vae = pair[0]
    side = 32 // vae.config.factor
    noise = torch.randn(2, vae.config.latent_channels, side, side, generator=torch.Generator().manual_seed(3))
    reconstruction, q = vae(pictures(), noise)
    assert reconstruction.shape == (2, 3, 32, 32)
    assert torch.equal(reconstruction, vae.decode_z(vae.posterior(pictures()).sample(noise)))
    assert torch.equal(q.mean, vae.posterior(pictures()).mean)


@torch.no_grad()
def test_latents_are_z_shifted_and_scaled(pair: tuple[AutoencoderKL, Any]):
    """encode turns z into latents channel by channel, its distribution with it; decode undoes that."""
    config = pair[0].config
    mean, std = (tuple(start + 0.5 * i for i in range(config.latent_channels)) for start in (-0.7, 0.4))
    vae = AutoencoderKL(dataclasses.replace(config, latent_mean=mean, latent_std=std))
    vae.load_state_dict(pair[0].state_dict())
    q, latents = vae.posterior(pictures()), vae.encode(pictures())
    noise = torch.randn(q.mean.shape, generator=torch.Generator().manual_seed(4))
    z, expected = q.sample(noise), torch.empty(q.mean.shape)
    for channel in range(config.latent_channels):
        expected[:, channel] = (z[:, channel] - mean[channel]) / std[channel]
    assert torch.allclose(latents.sample(noise), expected, atol=1e-5)
    assert torch.allclose(vae.decode(latents.sample(noise)), vae.decode_z(z), atol=1e-5)


def test_gradients_reach_every_parameter():
    vae = AutoencoderKL(SHAPES["f4, one layer"])
    reconstruction, q = vae(pictures(16, 16), torch.ones(2, 4, 4, 4))
    (reconstruction.square().mean() + q.kl().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    dead = [name for name, p in vae.named_parameters() if p.grad is not None and not p.grad.any()]
    assert all(name.endswith("to_k.bias") for name in dead)  # softmax does not see it; rounding may hide that


@pytest.mark.parametrize("size", [(30, 32), (32, 30), (34, 32)])
def test_a_size_that_does_not_divide_is_refused(size: tuple[int, int]):
    vae = AutoencoderKL(SHAPES["f4, one layer"])
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]} pixels is not divisible by .* factor 4"):
        vae.encode(pictures(*size))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"block_out_channels": (32, 48)}, r"holds 48, not a multiple of vae.norm_num_groups \(32\)"),
        ({"block_out_channels": (0, 32)}, "holds 0"),
        ({"block_out_channels": ()}, "block_out_channels is empty"),
        ({"layers_per_block": 0}, "layers_per_block must be at least 1, not 0"),
        ({"latent_channels": 0}, "latent_channels must be at least 1, not 0"),
        ({"norm_num_groups": 0}, "norm_num_groups must be at least 1, not 0"),
        ({"latent_mean": (0.0,) * 3}, "latent_mean has 3 numbers for 4 latent channels"),
        ({"latent_std": (1.0,) * 5}, "latent_std has 5 numbers for 4 latent channels"),
        ({"latent_std": (1.0, 0.0, 1.0, 1.0)}, "latent_std must be positive"),
    ],
)
def test_a_config_that_cannot_be_is_refused(settings: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        AutoencoderKLConfig(**settings)


def test_bfloat16_stays_bfloat16():
    vae = AutoencoderKL(SHAPES["f4, one layer"]).bfloat16()
    with torch.no_grad():
        latents = vae.encode(pictures(16, 16).bfloat16()).mean
        assert latents.dtype == vae.decode(latents).dtype == torch.bfloat16
