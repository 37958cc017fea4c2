"""Times by importance: drawn as often as the losses are large, and without a bias."""

import json

import pytest
import torch

from ldm.diffusion import EDMPath, LossHistory, ObjectiveConfig, ScaledLinearBetaPath, draw_times
from ldm.diffusion.importance import BINS, KEPT


def taught(loss) -> LossHistory:
    """A history that has seen loss(t) often enough everywhere."""
    history = LossHistory()
    t = (torch.arange(BINS) + 0.5) / BINS
    for _ in range(KEPT):
        history.record(t, loss(t))
    return history


def test_times_are_even_until_every_bin_is_known():
    history, u = LossHistory(), torch.linspace(0, 0.999, 50)
    assert torch.allclose(history.numbers(u), u, atol=1e-6)
    assert history.numbers(torch.ones(1)).item() == 1.0
    for _ in range(KEPT):
        history.record((torch.arange(BINS - 1) + 0.5) / BINS, torch.full((BINS - 1,), 9.0))
    assert torch.equal(history.densities, torch.ones(BINS, dtype=torch.float64))


def test_times_have_the_density_of_the_losses_roots_mean_square():
    history = taught(lambda t: 1 + 3 * t)
    u = (torch.arange(200_000) + 0.5) / 200_000
    t = history.numbers(u)
    assert (t.diff() >= 0).all()
    shares = torch.histc(t, bins=4, min=0, max=1) / len(t)
    exact = torch.tensor([1 + 3 * (i + 0.5) / 4 for i in range(4)])
    assert torch.allclose(shares, exact / exact.sum(), atol=1e-3)
    assert history.density(torch.tensor([0.505])).item() == pytest.approx((1 + 3 * 0.505) / 2.5, rel=2e-3)


def test_the_weighted_mean_is_that_of_even_times():
    history = taught(lambda t: torch.exp(3 * t))
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = history.numbers(u)
    found = ((t**2) / history.density(t)).mean().item()
    assert found == pytest.approx(1 / 3, rel=1e-3)
    assert (t**2).mean().item() > 0.5  # which it would not be without the weights


def test_the_last_losses_count_and_all_squares_of_them():
    history = LossHistory()
    t = (torch.arange(BINS) + 0.5) / BINS
    for loss in [100.0] * 3 + [1.0] * (KEPT - 1) + [3.0]:
        history.record(t, torch.full((BINS,), loss))
    history.record(torch.full((KEPT,), 0.995), torch.full((KEPT,), 5.0))
    one, last = ((KEPT - 1 + 9) / KEPT) ** 0.5, 5.0
    mean = (one * (BINS - 1) + last) / BINS
    assert history.densities[0].item() == pytest.approx(0.999 * one / mean + 0.001)
    assert history.densities[-1].item() == pytest.approx(0.999 * last / mean + 0.001)


@pytest.mark.parametrize("steps", [50, 150, 1000])
def test_the_weighted_mean_is_right_on_any_path(steps):
    """Tables raise numbers to their next node, EDM's path leaves out the cleanest: bins are of the numbers before."""
    objective = ObjectiveConfig(prediction="x0", time_sampling="importance")
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for path in (ScaledLinearBetaPath(num_train_timesteps=steps), EDMPath()):
        history = taught(lambda t: 1 + 20 * t**2)
        numbers = history.numbers(u)
        found = ((draw_times(objective, path, numbers) ** 2) / history.density(numbers)).mean()
        assert history.densities.max() > 2
        assert found.item() == pytest.approx((draw_times(objective, path, u) ** 2).mean().item(), rel=1e-3)


def test_json_keeps_it_to_the_last_bit():
    history, again = taught(lambda t: torch.sin(t) / 3), LossHistory()
    again.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert torch.equal(history.densities, again.densities)
    for each in (history, again):
        each.record(torch.tensor([0.3, 0.3]), torch.tensor([7.0, 0.1]))
    assert torch.equal(history.losses, again.losses) and torch.equal(history.seen, again.seen)
