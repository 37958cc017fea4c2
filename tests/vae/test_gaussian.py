"""The posterior against torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vae import DiagonalGaussian


@pytest.fixture
def posterior() -> DiagonalGaussian:
    generator = torch.Generator().manual_seed(0)
    return DiagonalGaussian.from_moments(2 * torch.randn(3, 8, 5, 6, generator=generator))


def oracle(posterior: DiagonalGaussian) -> Normal:
    return Normal(posterior.mean, torch.exp(0.5 * posterior.logvar))


def test_kl_is_that_of_torch(posterior: DiagonalGaussian):
    expected = kl_divergence(oracle(posterior), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    assert posterior.kl().shape == (3,)
    assert torch.allclose(posterior.kl(), expected, rtol=1e-5)
    zero = torch.zeros(2, 4, 1, 1)
    assert DiagonalGaussian(zero, zero).kl().tolist() == [0.0, 0.0]


def test_kl_of_bfloat16_moments_is_summed_in_float32(posterior: DiagonalGaussian):
    halves = DiagonalGaussian(posterior.mean.bfloat16(), posterior.logvar.bfloat16())
    exact = DiagonalGaussian(halves.mean.float(), halves.logvar.float()).kl()
    assert halves.kl().dtype == torch.float32 and torch.equal(halves.kl(), exact)


def test_a_sample_is_the_reparametrisation(posterior: DiagonalGaussian):
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
    expected = posterior.mean + oracle(posterior).stddev * noise
    assert torch.allclose(posterior.sample(noise), expected, rtol=1e-6)
    # Its log-density is what the noise's own says, shifted by the volume.
    density = oracle(posterior).log_prob(posterior.sample(noise))
    shifted = Normal(0.0, 1.0).log_prob(noise) - 0.5 * posterior.logvar
    assert torch.allclose(density, shifted, atol=1e-4)


def test_samples_have_the_moments(posterior: DiagonalGaussian):
    noise = torch.randn((4000, *posterior.mean.shape), generator=torch.Generator().manual_seed(2))
    drawn = posterior.sample(noise)
    std = torch.exp(0.5 * posterior.logvar)
    assert ((drawn.mean(0) - posterior.mean) / std).abs().max() < 5 / 4000**0.5
    assert (drawn.std(0) / std - 1).abs().max() < 5 / 8000**0.5


def test_gradients_reach_mean_and_variance():
    moments = torch.zeros(1, 2, 1, 1, requires_grad=True)
    DiagonalGaussian.from_moments(moments).sample(torch.full((1, 1, 1, 1), 3.0)).sum().backward()
    assert moments.grad is not None and moments.grad.flatten().tolist() == [1.0, 1.5]


def test_moments_are_split_and_clamped():
    moments = torch.tensor([1.0, 2.0, 99.0, -99.0]).view(1, 4, 1, 1)
    posterior = DiagonalGaussian.from_moments(moments)
    assert posterior.mean.flatten().tolist() == [1.0, 2.0]
    assert posterior.logvar.flatten().tolist() == [20.0, -30.0]
    assert posterior.kl().isfinite().all()
