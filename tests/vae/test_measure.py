"""PSNR by its formula; statistics that make sampled latents standard."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from vae import AutoencoderKL, AutoencoderKLConfig
from vae.losses import latent_statistics, psnr


def test_psnr_is_its_formula():
    pixels = torch.zeros(3, 3, 4, 4)
    reconstruction = torch.stack([torch.full((3, 4, 4), error) for error in (0.2, 0.02, 2.0)])
    found = psnr(reconstruction, pixels)
    # A peak of 2 (from -1 to 1) over the error, which counts up to the range alone: 2.0 is clamped to 1.
    assert found.tolist() == pytest.approx([20.0, 40.0, 20 * math.log10(2)], abs=1e-4)


def test_psnr_agrees_with_that_of_bytes():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 256, (2, 1, 3, 8, 8), generator=generator).double()
    expected = 10 * torch.log10(255**2 / (a - b).square().mean())
    assert psnr((a / 127.5 - 1).float(), (b / 127.5 - 1).float()).item() == pytest.approx(expected.item(), abs=1e-4)


def test_psnr_of_equal_pictures_is_finite():
    same = torch.rand(2, 3, 4, 4)
    assert psnr(same, same).isfinite().all() and (psnr(same, same) > 100).all()
    assert psnr(same.bfloat16(), same).dtype == torch.float32


@pytest.fixture
def vae() -> AutoencoderKL:
    """With posteriors as wide as the spread of their means, so that both count."""
    torch.manual_seed(0)
    vae = AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4))
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        assert vae.quant_conv.bias is not None
        vae.quant_conv.bias.copy_(torch.tensor([3.0, -2.0, 0.0, 0.5, -1.0, 0.0, 1.0, -3.0]))
    return vae


def test_sampled_latents_have_mean_0_and_deviation_1(vae: AutoencoderKL):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(50, 3, 32, 32, generator=generator) * 2 - 1
    pixels *= torch.linspace(0.1, 1, 50).view(-1, 1, 1, 1)  # the last batch differs from the others, and is smaller
    mean, std = latent_statistics(vae, pixels.split(12))
    vae.config = dataclasses.replace(vae.config, latent_mean=mean, latent_std=std)
    with torch.no_grad():
        q = vae.encode(pixels)
        latents = q.sample(torch.randn(q.mean.shape, generator=generator))
    assert len(set(mean)) == len(set(std)) == 4
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-2
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-2
    assert (q.mean.std(dim=(0, 2, 3)) < 0.95).any()  # the means alone would not do


def test_statistics_do_not_depend_on_the_batches(vae: AutoencoderKL):
    pixels = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    whole, parts = latent_statistics(vae, [pixels]), latent_statistics(vae, pixels.split(3))
    assert parts[0] == pytest.approx(whole[0], rel=1e-4) and parts[1] == pytest.approx(whole[1], rel=1e-4)
    assert not any(parameter.grad is not None for parameter in vae.parameters())
