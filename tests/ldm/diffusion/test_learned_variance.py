"""The bound's terms that teach a network its variance, against torch's divergences and numerical integration."""

import math

import pytest
import torch
from helpers.analytic import double, node_at

from ldm.diffusion import CosinePath, EDMPath, LinearBetaPath, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.diffusion.learned_variance import bound_terms, normal_kl, normal_nll
from ldm.diffusion.nodes import Step, ddpm_mean, variance_range

TABLES = [LinearBetaPath(), ScaledLinearBetaPath(), CosinePath(), ScaledLinearBetaPath(zero_terminal_snr=True)]
SHAPE = (1, 2, 3, 3)


def some(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.kind)
@pytest.mark.parametrize("i", [1, 2, 400, 999])
def test_a_term_is_the_divergence_of_two_normals(path, i):
    """i: the table's entry; 0 is the step to the data."""
    x0, x_t, x0_hat, share = some(0), some(1), some(2), some(3)
    step = Step(*(node_at(path, double(k / 1000)[0]) for k in (i + 1, i)))
    x_share, x0_share = ddpm_mean(step)
    small, large = variance_range(step)
    deviation = (small ** ((1 - share) / 2) * large ** ((1 + share) / 2)).sqrt()
    true = torch.distributions.Normal(x_share * x_t + x0_share * x0, math.sqrt(small))
    learned = torch.distributions.Normal(x_share * x_t + x0_share * x0_hat, deviation)
    exact = torch.distributions.kl_divergence(true, learned).mean() / math.log(2)
    (found,) = bound_terms(x0, x_t, x0_hat, share, path, torch.tensor([(i + 1) / 1000]))
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.kind)
def test_the_step_to_the_data_is_a_density(path):
    """Its variance lies between the second step's small one and its own large one."""
    x0, x_t, x0_hat, share = some(0), some(1), some(2), some(3)
    first, second = (Step(*(node_at(path, double(k / 1000)[0]) for k in (i + 1, i))) for i in (0, 1))
    deviation = (variance_range(second)[0] ** ((1 - share) / 2) * variance_range(first)[1] ** ((1 + share) / 2)).sqrt()
    exact = -torch.distributions.Normal(x0_hat, deviation).log_prob(x0).mean() / math.log(2)
    (found,) = bound_terms(x0, x_t, x0_hat, share, path, torch.tensor([0.001]))
    assert found.item() == pytest.approx(exact.item(), rel=1e-6)


def test_the_divergence_against_numerical_integration():
    mean, log_variance, other_mean, other_log_variance = double(0.3), double(-1.0), double(-0.2), double(0.4)
    x = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    p, q = -normal_nll(x, mean, log_variance), -normal_nll(x, other_mean, other_log_variance)
    assert torch.trapezoid(p.exp(), x).item() == pytest.approx(1.0, rel=1e-9)
    exact = torch.trapezoid(p.exp() * (p - q), x).item()
    assert normal_kl(mean, log_variance, other_mean, other_log_variance).item() == pytest.approx(exact, rel=1e-7)


def test_each_sample_has_the_term_of_its_own_time():
    path, t = ScaledLinearBetaPath(), torch.tensor([0.001, 0.4, 1.0])
    inputs = [torch.cat([some(seed + k) for k in (10, 20, 30)]) for seed in range(4)]
    x0, x_t, x0_hat, share = inputs
    together = bound_terms(x0, x_t, x0_hat, share, path, t)
    for i in range(3):
        alone = bound_terms(*(each[i : i + 1] for each in inputs), path, t[i : i + 1])  # pyright: ignore[reportCallIssue]
        assert together[i].item() == pytest.approx(alone.item(), rel=1e-12)


def test_the_share_learns_what_scatters():
    """For data N(0, s^2) the best variance is small + x0_share^2 Var[x0 | x_t]: following the gradient finds it."""
    path, t, s = ScaledLinearBetaPath(), double(0.004), 0.6
    generator = torch.Generator().manual_seed(0)
    x0 = s * torch.randn(1, 1, 300, 300, generator=generator, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    x0_hat = alpha * s**2 / (alpha**2 * s**2 + sigma**2) * x_t
    share = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([share], max_iter=50)

    def closure() -> float:
        optimizer.zero_grad()
        loss = bound_terms(x0, x_t, x0_hat, share.expand(x0.shape), path, t).mean()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    step = Step(node_at(path, t[0]), node_at(path, t[0] - 0.001))
    small, large = variance_range(step)
    uncertain = (s**2 * sigma**2 / (alpha**2 * s**2 + sigma**2)).item()
    exact = small + ddpm_mean(step)[1] ** 2 * uncertain
    assert -0.99 < share.item() < 0.99
    assert share.item() == pytest.approx(2 * math.log(exact / small) / math.log(large / small) - 1, abs=0.03)


@pytest.mark.parametrize("path", [RectifiedFlowPath(), EDMPath()])
def test_a_path_without_steps_is_refused(path):
    with pytest.raises(ValueError, match=f"path {path.kind} has no discrete steps"):
        bound_terms(some(0), some(1), some(2), some(3), path, torch.tensor([0.5]))
