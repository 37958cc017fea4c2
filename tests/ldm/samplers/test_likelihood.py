"""Likelihoods against densities that are known."""

import math

import pytest
import torch
from helpers.analytic import double, generators, ideal_denoiser, mixture_denoiser
from torch import Tensor

from ldm.diffusion.paths import CosinePath, PathConfig, RectifiedFlowPath
from ldm.samplers.likelihood import bits_per_dimension, log_likelihood, signs

CENTRES = torch.tensor([[1.5, 0.0], [-1.0, 1.0]], dtype=torch.float64)
SPREAD, SHARES = 0.4, torch.tensor([0.7, 0.3], dtype=torch.float64)


def mixture_log_density(x: Tensor, path: PathConfig, t: Tensor) -> Tensor:
    """Of x_t, N x 2."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    variance = alpha**2 * SPREAD**2 + sigma**2
    squares = (x[:, None] - alpha * CENTRES).square().sum(2) / (2 * variance)
    return (SHARES.log() - squares - (2 * math.pi * variance).log()).logsumexp(1)


@pytest.mark.parametrize("path", [RectifiedFlowPath(), CosinePath(zero_terminal_snr=True)])
def test_a_mixtures_likelihood_within_one_percent(path):
    generator = torch.Generator().manual_seed(0)
    which = torch.multinomial(SHARES, 12, replacement=True, generator=generator)
    x = CENTRES[which] + SPREAD * torch.randn(12, 2, generator=generator, dtype=torch.float64)
    times = path.time_of_log_snr(torch.linspace(-14, 6, 160, dtype=torch.float64))
    times = torch.cat([torch.ones(1).double(), times])
    # In two dimensions two probes that are at right angles give the divergence itself.
    probes = [double(1, 1).expand(12, 2), double(1, -1).expand(12, 2)]
    found = torch.stack(
        [log_likelihood(mixture_denoiser(path, CENTRES, SHARES, SPREAD), x, path, times, probe) for probe in probes]
    ).mean(0)
    exact = mixture_log_density(x, path, times[-1])
    assert ((found - exact).abs() <= 0.01 * exact.abs()).all()
    assert found.mean().item() == pytest.approx(exact.mean().item(), rel=2e-3)


def test_a_gaussians_likelihood_is_exact_whatever_the_probe(path):
    """In each dimension by itself the divergence needs no estimate."""
    mean, std = 0.3, 0.7 * path.sigma_data
    denoise = ideal_denoiser(path, mean, std)

    low, high = path.log_snr_range
    times = path.time_of_log_snr(torch.linspace(max(low, -13.0), min(high, 5.0), 300, dtype=torch.float64))
    times = torch.cat([double(1.0), times[times < 1]])
    x = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = log_likelihood(denoise, x, path, times, signs(x, generators(0, 1, 2)))
    alpha, sigma = path.alpha(times[-1]), path.sigma(times[-1])
    exact = torch.distributions.Normal(alpha * mean, (alpha**2 * std**2 + sigma**2).sqrt()).log_prob(x).sum((1, 2, 3))
    # Where the path does not end in pure noise, the prior is wrong by about as much as is left of the data.
    assert torch.allclose(found, exact, atol=0.01 + 8 * path.alpha(times[0]).item() / path.sigma(times[0]).item())


def test_the_integral_is_of_fourth_order():
    """Of Runge and Kutta's method: half the step, a sixteenth of the error."""
    path, mean, std = RectifiedFlowPath(), 0.3, 0.4
    denoise = ideal_denoiser(path, mean, std)

    x, errors = double(-0.4, 0.1, 0.9)[:, None], []
    for steps in (8, 16, 32):
        times = torch.linspace(1.0, 0.25, steps + 1, dtype=torch.float64)
        found = log_likelihood(denoise, x, path, times, torch.ones_like(x))
        exact = torch.distributions.Normal(double(0.75 * mean), double((0.75**2 * std**2 + 0.25**2) ** 0.5)).log_prob(x)
        errors.append((found - exact[:, 0]).abs().max().item())
    assert errors[0] / errors[1] > 12 and errors[1] / errors[2] > 12


def test_signs_are_each_samples_own():
    x = torch.zeros(3, 4, 5)
    probe = signs(x, generators(7, 8, 9))
    assert set(probe.unique().tolist()) == {-1.0, 1.0} and probe.shape == x.shape
    assert torch.equal(probe[1:2], signs(x[1:2], generators(8)))


def test_bits():
    assert bits_per_dimension(torch.tensor([-8 * math.log(2)]), 4).item() == pytest.approx(2.0)


def test_times_that_cannot_be_are_refused():
    path = RectifiedFlowPath()
    for times in (torch.tensor([1.0, 0.0]), torch.tensor([0.1, 0.9]), torch.tensor([0.9, 0.1])):
        with pytest.raises(ValueError, match="must decrease strictly from 1 to above 0"):
            log_likelihood(lambda x, t: x, torch.zeros(1, 1), path, times, torch.ones(1, 1))
