"""Power-function averages against their definition, the paper's table and numerical integration."""

import math

import pytest
import torch

from ldm.training.optim.averages import (
    EMA,
    LONGEST,
    PowerProfile,
    Snapshot,
    gamma_of_length,
    length_of_gamma,
    mixture,
    overlap,
)


def profile(gamma: float, end: float, t: torch.Tensor) -> torch.Tensor:
    return torch.where(t <= end, (gamma + 1) * (t / end) ** gamma / end, 0.0)


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.1, 6.94), (0.25, 0.72)])
def test_gamma_of_the_papers_lengths(length, gamma):
    """Karras et al. 2023, section 3.1: sigma_rel 0.05 and 0.10 correspond to gamma 16.97 and 6.94."""
    assert gamma_of_length(length) == pytest.approx(gamma, abs=0.01)
    assert length_of_gamma(gamma_of_length(length)) == pytest.approx(length, rel=1e-12)


@pytest.mark.parametrize("length", [0.01, 0.05, 0.2])
def test_the_length_is_the_profiles_deviation(length):
    t = torch.linspace(0, 1, 2_000_001, dtype=torch.float64)
    p = profile(gamma_of_length(length), 1.0, t)
    mean = torch.trapezoid(p * t, t)
    assert torch.trapezoid(p, t).item() == pytest.approx(1.0, abs=1e-6)
    assert torch.trapezoid(p * (t - mean) ** 2, t).sqrt().item() == pytest.approx(length, rel=1e-5)


def test_the_longest_length_is_the_plain_mean():
    assert length_of_gamma(0.0) == pytest.approx(LONGEST)
    values = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    ema = EMA([("w", torch.full((3,), 1e6))], PowerProfile(LONGEST - 1e-12))
    for value in values:
        ema.update([("w", value)])
    assert torch.allclose(ema.shadow["w"], values.mean(0), atol=1e-5)


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_each_weight_counts_by_its_power(length):
    """After T updates value t has the share (t^(g+1) - (t-1)^(g+1)) / T^(g+1): the profile's integral over it."""
    total, power = 40, gamma_of_length(length) + 1
    ema = EMA([("w", torch.full((total,), 1e6))], PowerProfile(length))
    for value in torch.eye(total):
        ema.update([("w", value)])
    t = torch.arange(1, total + 1, dtype=torch.float64)
    shares = (t**power - (t - 1) ** power) / total**power
    assert torch.allclose(ema.shadow["w"].double(), shares, atol=1e-6)


@pytest.mark.parametrize(
    ("a", "b"), [((16.97, 3.0), (6.94, 5.0)), ((6.94, 5.0), (16.97, 3.0)), ((2.0, 4.0), (9.0, 4.0))]
)
def test_an_overlap_is_the_integral_of_the_product(a: tuple[float, float], b: tuple[float, float]):
    t = torch.linspace(0, 6, 2_000_001, dtype=torch.float64)
    exact = torch.trapezoid(profile(*a, t) * profile(*b, t), t).item()
    assert overlap(*a, *b) == pytest.approx(exact, rel=1e-4)


def drift(steps: int) -> torch.Tensor:
    """Weights in training: they settle, on different time scales, and shake."""
    t = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
    rates = torch.tensor([1.0, 3.0, 10.0, 30.0], dtype=torch.float64)
    noise = torch.randn(steps, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (-rates * t).exp() + torch.sin(5 * rates.sqrt() * t) + 0.3 * noise


def average(weights: torch.Tensor, length: float) -> torch.Tensor:
    """Of each step, in float64."""
    found, now = [], torch.zeros_like(weights[0])
    for n, value in enumerate(weights, 1):
        now = torch.lerp(value, now, PowerProfile(length)(n))
        found.append(now)
    return torch.stack(found)


@pytest.mark.parametrize(
    ("length", "step"), [(0.03, 4000), (0.07, 4000), (0.13, 4000), (0.2, 4000), (0.07, 3250), (0.13, 3300), (0.2, 3300)]
)
def test_any_length_is_reconstructed_at_any_step(length, step):
    weights = drift(4000)
    kept = {known: average(weights, known) for known in (0.05, 0.1)}
    snapshots = [Snapshot(s, known) for s in range(250, 4001, 250) for known in kept]
    made = mixture(snapshots, Snapshot(step, length))
    found = sum(x * kept[s.length][s.step - 1] for x, s in zip(made.shares, snapshots, strict=True))
    exact = average(weights, length)[step - 1]
    assert isinstance(found, torch.Tensor)
    nearest = min((kept[known][step - 1] - exact).norm().item() for known in kept)
    assert (found - exact).norm() < 0.025
    assert (found - exact).norm() < nearest / 2 or nearest < 0.025
    # The profile ends with a jump, which only a snapshot of that very step can make.
    assert made.error < (0.1 if step % 250 == 0 else 0.4)


def test_one_of_the_snapshots_is_itself():
    snapshots = [Snapshot(s, known) for s in (100, 200, 300) for known in (0.05, 0.1)]
    made = mixture(snapshots, Snapshot(200, 0.1))
    assert made.error == pytest.approx(0.0, abs=1e-6)
    assert made.shares == pytest.approx([0, 0, 0, 1, 0, 0], abs=1e-6)


def test_the_error_is_that_of_the_profile():
    made, t = (
        mixture([Snapshot(50, 0.05), Snapshot(100, 0.1)], Snapshot(80, 0.12)),
        torch.linspace(0, 100, 1_000_001).double(),
    )
    profiles = [profile(gamma_of_length(length), end, t) for end, length in ((50, 0.05), (100, 0.1), (80, 0.12))]
    left = made.shares[0] * profiles[0] + made.shares[1] * profiles[1] - profiles[2]
    exact = math.sqrt(torch.trapezoid(left**2, t).item() / torch.trapezoid(profiles[2] ** 2, t).item())
    assert made.error == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.29, float("nan")])
def test_impossible_lengths_are_refused(length):
    with pytest.raises(ValueError, match=f"the EMA's length is {length}, expected 0.0001 or more and less than 0.289"):
        PowerProfile(length)


def test_nothing_is_no_mixture():
    with pytest.raises(ValueError, match="no snapshots"):
        mixture([], Snapshot(1, 0.1))


@pytest.mark.parametrize(("step", "length"), [(1500, 0.1), (2000, 0.25), (2000, 0.01), (1200, 0.05)])
def test_weights_keep_their_size_where_the_profile_is_missed(step, length):
    snapshots = [Snapshot(s, known) for s in (1000, 2000) for known in (0.05, 0.1)]
    made = mixture(snapshots, Snapshot(step, length))
    assert made.error > 0.1 and sum(made.shares) == pytest.approx(1.0)
