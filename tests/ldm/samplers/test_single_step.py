"""The steps of single samplers, each against its definition or another derivation."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from helpers.analytic import double, generators, ideal_denoiser, node_at
from torch import Tensor

from ldm.diffusion.nodes import Step, ddpm_mean, variance_added, variance_range
from ldm.diffusion.paths import LinearBetaPath, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.samplers import SAMPLERS, noise_like, time_grid
from ldm.samplers.linear_multistep import adams_weights, mean_weights
from ldm.samplers.single_step import ddim


def test_ddpm_posterior_is_bayes_rule(path):
    """q(x' | x, x0) from the joint Gaussian of (x', x) given x0, by conditioning, for several strides."""
    times = double(1.0, 0.97, 0.5, 0.1, 0.001, 0.0)
    for t, t_next in pairwise(times):
        alpha, sigma, alpha_next, sigma_next = (f(u).item() for u in (t, t_next) for f in (path.alpha, path.sigma))
        ratio = alpha / alpha_next
        covariance = ratio * sigma_next**2  # of x = ratio x' + fresh noise, and x'
        gain = covariance / sigma**2
        x, x0 = 0.7, -1.3
        mean = alpha_next * x0 + gain * (x - alpha * x0)
        variance = sigma_next**2 - gain * covariance
        step = Step(node_at(path, t), node_at(path, t_next))
        x_share, x0_share = ddpm_mean(step)
        assert x_share * x + x0_share * x0 == pytest.approx(mean, rel=1e-9, abs=1e-12)
        assert variance_range(step)[0] == pytest.approx(variance, rel=1e-6, abs=1e-15)


def test_one_euler_serves_k_diffusion_and_flow():
    """On the same nodes: Euler on x / alpha in sigma / alpha, and Euler on x in the flow's time, to 1e-12."""
    path, times = RectifiedFlowPath(), double(0.98, 0.7, 0.65, 0.3, 0.02)
    start = double(0.3, -1.1).view(1, 1, 1, 2)
    denoise, x_flow, x_k = ideal_denoiser(path), start, start / (1 - times[0])
    for t, t_next in pairwise(times):
        velocity = (x_flow - denoise(x_flow, t)) / t
        x_flow = x_flow + (t_next - t) * velocity
        sigma, sigma_next = t / (1 - t), t_next / (1 - t_next)
        slope = (x_k - denoise(x_k * (1 - t), t)) / sigma
        x_k = x_k + (sigma_next - sigma) * slope
    ours = SAMPLERS["euler"].function(denoise, start, path, times, generators(0))
    assert torch.allclose(ours, x_flow, rtol=0, atol=1e-12)
    assert torch.allclose(ours, x_k * (1 - times[-1]), rtol=0, atol=1e-12)


def test_ddim_with_eta_1_is_ddpm(path):
    x, times = noise_like(torch.empty(2, 1, 4, 4), generators(1, 2)).double(), time_grid(path, 8, "log_snr")
    pictures = [
        function(ideal_denoiser(path), x, path, times, generators(5, 6))
        for function in (partial(ddim, eta=1.0), SAMPLERS["ddpm"].function, SAMPLERS["euler_ancestral"].function)
    ]
    assert torch.allclose(pictures[0], pictures[1], rtol=1e-9, atol=1e-9)
    assert torch.equal(pictures[0], pictures[2])


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_has_the_same_marginals_whatever_eta(eta, path, monkeypatch):
    """Song et al. 2020, lemma 1: if x0 were known, x' would have the forward process's mean and variance."""
    times = path.time_of_log_snr(2 * double(-1.0, 0.2, 1.0))
    mean, variance = 0.7, 0.0  # of x0: one point
    start_mean = path.alpha(times[0]).item() * mean
    x = torch.full((1, 1, 1, 4), start_mean, dtype=torch.float64)
    x[..., 0] += path.sigma(times[0]).item()
    drawn = 0

    def basis_noise(x: Tensor, _: Sequence[torch.Generator]) -> Tensor:
        nonlocal drawn
        drawn += 1
        return torch.nn.functional.one_hot(torch.tensor(drawn), 4).to(x).expand_as(x)

    monkeypatch.setattr("ldm.samplers.steps.noise_like", basis_noise)
    x = ddim(lambda x, t: torch.full_like(x, mean), x, path, times, [], eta=eta).flatten()
    variance = (x[:-1] - x[-1]).square().sum().item()
    assert x[-1].item() == pytest.approx(path.alpha(times[-1]).item() * mean, rel=1e-12)
    assert variance == pytest.approx(path.sigma(times[-1]).item() ** 2, rel=1e-9)


def test_ddpms_large_variance_is_that_of_the_forward_step():
    path = LinearBetaPath()
    for i in (1, 500, 999):
        step = Step(*(node_at(path, double((k + 1) / 1000)[0]) for k in (i, i - 1)))
        assert variance_added(step) == pytest.approx(path.betas()[i].item(), rel=1e-9)
        assert variance_range(step)[1] == variance_added(step)


@pytest.mark.parametrize(("share", "name"), [(-1.0, "ddpm"), (1.0, "ddpm_large")])
def test_the_ends_of_the_learned_variance_are_the_fixed_ones(share, name):
    path, x = ScaledLinearBetaPath(), noise_like(torch.empty(2, 1, 4, 4), generators(1, 2)).double()
    denoise, times = ideal_denoiser(path), time_grid(path, 6)
    pictures = [
        SAMPLERS[sampler].with_options(variance=lambda: torch.full_like(x, share))(
            denoise, x, path, times, generators(3, 4)
        )
        for sampler in ("ddpm_learned", name)
    ]
    assert torch.allclose(*pictures, rtol=1e-9, atol=1e-12)


def test_the_learned_variance_is_a_geometric_mean():
    path, times = ScaledLinearBetaPath(), double(0.8, 0.4)
    small, large = variance_range(Step(node_at(path, times[0]), node_at(path, times[1])))
    x = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    draw = SAMPLERS["ddpm_learned"].with_options(variance=lambda: torch.full_like(x, 0.5))
    drawn = draw(lambda x, t: torch.zeros_like(x), x, path, times, generators(5))
    assert torch.allclose(drawn, (large**0.75 * small**0.25) ** 0.5 * noise_like(x, generators(5)))


def test_adams_weights_on_even_steps_are_the_textbooks():
    """Of PLMS in t, and of LMS in kappa, which here is even as well."""
    nodes, textbook = [0.9, 0.8, 0.7, 0.6], [-9 / 24, 37 / 24, -59 / 24, 55 / 24]
    assert mean_weights(nodes, 0.5) == pytest.approx(textbook, rel=1e-9)
    assert adams_weights(nodes, 0.5, lambda kappa: kappa) == pytest.approx([-0.1 * w for w in textbook], rel=1e-9)
    assert mean_weights([0.8, 0.7], 0.6) == pytest.approx([-0.5, 1.5]) and mean_weights([0.8], 0.6) == pytest.approx(
        [1.0]
    )


def test_lcm_goes_where_the_denoiser_says_and_makes_new_noise():
    path, times = ScaledLinearBetaPath(), double(1.0, 0.5, 0.0)
    x = SAMPLERS["lcm"].function(lambda x, t: torch.full_like(x, 2.0), torch.zeros(1, 1, 4, 4), path, times[:2],
                                 generators(7))  # fmt: skip
    noise = noise_like(x, generators(7))
    assert torch.allclose(x, path.alpha(times[1]).float() * 2 + path.sigma(times[1]).float() * noise)
    final = SAMPLERS["lcm"].function(lambda x, t: torch.full_like(x, 2.0), x, path, times, generators(7))
    assert torch.equal(final, torch.full_like(x, 2.0))
