"""The steps of docs/mathematics.md that no single function is: each against another way to the same number."""

import math
from typing import get_args

import pytest
import torch
from helpers.analytic import MEAN, STD, double, ideal_denoiser, marginal, node_at
from torch import Tensor

from ldm.diffusion.nodes import Step, ddpm_mean, variance_range
from ldm.diffusion.objective import ObjectiveConfig, Weighting, loss_weight
from ldm.diffusion.paths import CosinePath, LinearBetaPath, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.diffusion.predictions import Prediction, eps_from_x0, noise_sample, target, to_x0, velocity_target


@pytest.mark.parametrize("kind", [LinearBetaPath, ScaledLinearBetaPath, CosinePath])
def test_many_small_steps_are_one(kind):
    """Equations 1 to 3: a thousand times sqrt(1 - beta) x + sqrt(beta) eps, share and variance carried along."""
    path = kind()
    share, variance = 1.0, 0.0
    for i, beta in enumerate(path.betas().tolist()):
        share, variance = math.sqrt(1 - beta) * share, (1 - beta) * variance + beta
        if i in (0, 1, 10, 500, 999):
            t = double((i + 1) / 1000)
            assert path.alpha(t).item() == pytest.approx(share, rel=1e-9)
            assert path.sigma(t).item() ** 2 == pytest.approx(variance, rel=1e-9)


def test_a_chain_of_draws_has_the_closed_forms_moments():
    path = LinearBetaPath(beta_start=0.05, beta_end=0.3, num_train_timesteps=12)
    generator = torch.Generator().manual_seed(0)
    x = torch.full((200_000,), 1.5)
    for beta in path.betas().tolist():
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(len(x), generator=generator)
    end = double(1.0)
    assert x.mean().item() == pytest.approx(1.5 * path.alpha(end).item(), abs=0.01)
    assert x.var().item() == pytest.approx(path.sigma(end).item() ** 2, rel=0.015)


def test_a_term_of_the_bound_is_the_fall_of_the_snr(path):
    """Equations 10 and 11: the divergence of two of the posterior's normals, integrated numerically as well."""
    start, end = (node_at(path, t) for t in double(0.6, 0.55))
    x_share, x0_share = ddpm_mean(Step(start, end))
    deviation = math.sqrt(variance_range(Step(start, end))[0])
    x, x0, guess = 0.3, 0.9, 0.5
    means = [x_share * x + x0_share * value for value in (x0, guess)]
    fall = (end.alpha / end.sigma) ** 2 - (start.alpha / start.sigma) ** 2
    assert (means[0] - means[1]) ** 2 / (2 * deviation**2) == pytest.approx(fall * (x0 - guess) ** 2 / 2, rel=1e-9)
    grid = torch.linspace(-9, 9, 20_001, dtype=torch.float64) * deviation + means[0]
    p, q = (torch.distributions.Normal(double(mean)[0], double(deviation)[0]) for mean in means)
    integral = torch.trapezoid(p.log_prob(grid).exp() * (p.log_prob(grid) - q.log_prob(grid)), grid)
    assert integral.item() == pytest.approx(fall * (x0 - guess) ** 2 / 2, rel=1e-6)


@pytest.mark.parametrize("prediction", get_args(Prediction))
@pytest.mark.parametrize("time", [0.2, 0.7])
def test_every_objective_has_the_same_minimiser(path, prediction, time):
    """Equation 12 and its relatives: a linear model, fitted to any of them, is E[x_0 | x_t] of Gaussian data.

    Four points, mean +- deviation for the data and +- 1 for the noise, have the normals' first two moments, and a
    linear fit knows no others.
    """
    t = double(time)
    x0 = double(MEAN + STD, MEAN + STD, MEAN - STD, MEAN - STD)
    eps = double(1, -1, 1, -1)
    x_t, wanted = noise_sample(x0, eps, path, t[0]), target(prediction, x0, eps, path, t[0])
    fit = torch.linalg.lstsq(torch.stack([x_t, torch.ones(4).double()], dim=1), wanted[:, None]).solution.flatten()
    x = double(-1.3, 0.0, 2.1)
    found = to_x0(prediction, fit[0] * x + fit[1], x, path, t[0])
    assert torch.allclose(found, ideal_denoiser(path)(x, t), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("weighting", get_args(Weighting))
@pytest.mark.parametrize("prediction", get_args(Prediction))
def test_a_linear_model_learns_the_ideal_denoiser_by_any_loss(prediction, weighting):
    """The same by training: gradients of the weighted loss over several times, on the flow."""
    path, t = RectifiedFlowPath(), double(0.15, 0.4, 0.6, 0.85)
    objective = ObjectiveConfig(prediction=prediction, weighting=weighting)
    x0 = double(MEAN + STD, MEAN + STD, MEAN - STD, MEAN - STD).expand(4, 4)  # a row a time
    eps = double(1, -1, 1, -1).expand(4, 4)
    x_t, wanted = noise_sample(x0, eps, path, t), target(prediction, x0, eps, path, t)
    weights = torch.zeros(2, 4, 1, dtype=torch.float64, requires_grad=True)  # slope and offset at each time
    optimizer = torch.optim.LBFGS([weights], max_iter=400, tolerance_grad=1e-9, tolerance_change=1e-14)

    def closure() -> Tensor:
        optimizer.zero_grad()
        errors = (weights[0] * x_t + weights[1] - wanted).square().mean(1)
        loss = (loss_weight(objective, path, t) * errors).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    for i in range(4):
        x = double(-1.3, 0.0, 2.1)
        output = (weights[0, i] * x + weights[1, i]).detach()
        found = to_x0(prediction, output, x, path, t[i])
        assert torch.allclose(found, ideal_denoiser(path)(x, t[i]), atol=1e-3)


def test_the_ode_keeps_the_marginals(path):
    """Equation 19: along it a sample keeps its quantile of the marginal."""
    for time in (0.3, 0.5004, 0.9):
        t = torch.tensor(time, dtype=torch.float64, requires_grad=True)
        x = marginal(path, t, double(0.8))[0]
        (slope,) = torch.autograd.grad(x, t)
        t, x = t.detach(), x.detach()
        x0 = ideal_denoiser(path)(x, t)
        eps = eps_from_x0(x0, x, path.alpha(t), path.sigma(t))
        assert velocity_target(x0, eps, path.d_alpha(t), path.d_sigma(t)).item() == pytest.approx(
            slope.item(), rel=1e-9
        )


def test_the_ode_solved_for_all_but_x0(path):
    """Equation 22, integrated numerically along the exact solution."""
    grid = torch.linspace(-1.0, 1.5, 4001, dtype=torch.float64)
    times = path.time_of_log_snr(2 * grid)
    x = marginal(path, times, double(-1.1))
    alpha, sigma = path.alpha(times), path.sigma(times)
    ideal = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
    ends = [path.sigma(times[i]).item() for i in (0, -1)]
    integral = torch.trapezoid(grid.exp() * ideal, grid).item()
    assert ends[1] / ends[0] * x[0].item() + ends[1] * integral == pytest.approx(x[-1].item(), rel=1e-6)
