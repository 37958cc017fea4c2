"""Random numbers of training: a function of (seed, position), whatever the batch; and random."""

import pytest
import torch

from ldm.diffusion.objective import ObjectiveConfig, TimeNumbers
from ldm.diffusion.randomness import (
    drop_captions,
    keyed_uniform,
    mixed_seed,
    sample_randomness,
    spread_uniforms,
    training_noise,
    van_der_corput,
)

SHAPE = (4, 16, 16)


def test_independent_of_the_grouping_into_batches():
    whole = sample_randomness(7, range(100, 106), SHAPE)
    for order in ([103], [105, 100], [104, 103, 101]):
        part = sample_randomness(7, order, SHAPE)
        rows = [position - 100 for position in order]
        for numbers, expected in zip(part, whole, strict=True):
            assert torch.equal(numbers, expected[rows])


def test_shapes_dtypes_and_ranges():
    eps, time_uniforms, drop_uniforms = sample_randomness(0, range(500), (1, 4, 4))
    assert eps.shape == (500, 1, 4, 4) and eps.dtype == torch.float32
    for uniforms in (time_uniforms, drop_uniforms):
        assert uniforms.shape == (500,) and uniforms.dtype == torch.float32
        assert (uniforms >= 0).all() and (uniforms < 1).all()
        assert abs(uniforms.mean() - 0.5) < 4 * (1 / 12 / 500) ** 0.5
        assert abs(uniforms.var() - 1 / 12) < 0.015


def test_noise_is_standard_normal():
    eps = sample_randomness(3, range(200), SHAPE).eps.double()
    n = eps.numel()
    assert abs(eps.mean()) < 4 / n**0.5
    assert abs(eps.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((eps**4).mean() - 3) < 4 * (96 / n) ** 0.5


def test_positions_and_seeds_are_uncorrelated():
    """All pairs of neighbours: a seed of seed + position would make some of them equal."""
    rows = [sample_randomness(seed, range(20), SHAPE).eps.flatten(1) for seed in (0, 1, 2)]
    correlation = torch.corrcoef(torch.cat(rows))
    off_diagonal = correlation[~torch.eye(60, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 5 / 1024**0.5
    assert abs(off_diagonal.std() - 1 / 1024**0.5) < 0.1 / 1024**0.5


def test_time_and_drop_are_uncorrelated_with_each_other_and_with_the_noise():
    eps, time_uniforms, drop_uniforms = sample_randomness(5, range(2000), (1, 4, 4))
    table = torch.stack([time_uniforms, drop_uniforms, eps[:, 0, 0, 0], eps.flatten(1).mean(1)])
    correlation = torch.corrcoef(table)[:2]
    assert correlation[~torch.eye(2, 4, dtype=torch.bool)].abs().max() < 4 / 2000**0.5


def test_same_bits_as_ever():
    """A run resumed after an update of this program must go on with the same numbers."""
    assert [mixed_seed(0, 0), mixed_seed(1, 2), mixed_seed(12, 10**9)] == [
        3560153452049741418,
        6417476540401971169,
        8918232393175323630,
    ]
    eps, time_uniforms, drop_uniforms = sample_randomness(1, [2], SHAPE)
    assert torch.allclose(eps[0, 0, 0, :3], torch.tensor([0.5527112, 0.0642379, 0.2613832]), rtol=0, atol=1e-5)
    assert torch.allclose(
        torch.cat([time_uniforms, drop_uniforms]), torch.tensor([0.2482343, 0.6519350]), rtol=0, atol=1e-6
    )


def test_low_bits_of_the_seed_are_mixed():
    """PyTorch keeps only those: let there be no collision among the first positions of some runs."""
    seeds = {mixed_seed(seed, position) & 0xFFFFFFFF for seed in range(4) for position in range(2000)}
    assert len(seeds) == 8000


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    sample_randomness(0, range(3), SHAPE)
    assert torch.equal(torch.random.get_rng_state(), before)


SPREADS = pytest.mark.parametrize("kind", ["stratified", "sobol"])


def spread(kind: TimeNumbers, positions: range | list[int], *, seed: int = 0, batch_size: int = 16) -> torch.Tensor:
    uniforms = torch.full((len(positions),), 0.25)
    return spread_uniforms(kind, uniforms, positions, batch_size=batch_size, seed=seed)


def test_independent_numbers_are_those_given():
    assert spread("independent", range(5)).tolist() == [0.25] * 5


@SPREADS
def test_spread_numbers_depend_on_seed_and_position_alone(kind):
    whole = spread(kind, range(64))
    assert torch.equal(whole[[40, 3]], spread(kind, [40, 3]))
    assert not torch.equal(whole, spread(kind, range(64), seed=1))
    assert whole.dtype == torch.float32 and (whole >= 0).all() and (whole < 1).all()


@SPREADS
def test_each_sixteenth_holds_one_number_of_a_batch_of_sixteen(kind):
    for batch in range(5):
        numbers = spread(kind, range(16 * batch, 16 * batch + 16)).double()
        gaps = torch.cat([numbers.sort().values, numbers.min()[None] + 1]).diff()
        assert gaps.max().item() == pytest.approx(1 / 16, abs=1e-6)


def test_strata_move_from_batch_to_batch_and_each_place_sees_all_times():
    firsts = spread("stratified", range(0, 16 * 2000, 16))
    assert firsts.mean().item() == pytest.approx(0.5, abs=0.02)
    assert firsts.var().item() == pytest.approx(1 / 12, rel=0.06)


def test_van_der_corput():
    assert [van_der_corput(i) for i in range(6)] == [0.0, 0.5, 0.25, 0.75, 0.125, 0.625]


def test_training_noise_is_eps_unless_more_is_asked_for():
    eps = sample_randomness(0, range(3), SHAPE).eps
    plain, added = training_noise(ObjectiveConfig(prediction="eps"), eps, seed=0, positions=range(3))
    assert plain is eps and added is eps


def test_training_noise_with_offset_and_perturbation_depends_on_position_alone():
    config = ObjectiveConfig(prediction="eps", offset_noise=0.3, input_perturbation=0.2)
    eps = sample_randomness(0, range(40), SHAPE).eps
    known, added = training_noise(config, eps, seed=0, positions=range(40))
    part = training_noise(config, eps[7:9], seed=0, positions=[7, 8])
    assert torch.equal(known[7:9], part[0]) and torch.equal(added[7:9], part[1])
    assert (added - known).std().item() == pytest.approx(0.2, rel=0.02)
    assert known.mean(dim=(2, 3)).var().item() == pytest.approx((1 / 256 + 0.09) / 1.09, rel=0.3)


def test_keyed_numbers_are_uniform_below_one():
    numbers = torch.tensor([keyed_uniform("any", i) for i in range(20_000)], dtype=torch.float64)
    assert 0 <= numbers.min() and numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.01)
    assert numbers.var().item() == pytest.approx(1 / 12, rel=0.03)


@pytest.mark.parametrize("kind", ["stratified", "sobol"])
def test_spread_numbers_stay_below_one_in_float32(kind, monkeypatch):
    monkeypatch.setattr("ldm.diffusion.randomness.keyed_uniform", lambda *key: 1 - 1e-12)
    found = spread_uniforms(kind, torch.zeros(1), [0], batch_size=4, seed=0)
    assert found.item() == 1 - 2**-24


def test_captions_are_dropped_each_by_its_own_number():
    captions, uniforms = ["a", "b", "c", "d"], torch.tensor([0.05, 0.1, 0.0, 0.999])
    assert drop_captions(captions, uniforms, 0.1) == ["", "b", "", "d"]
    assert drop_captions(captions, uniforms, 0.0) == captions
    assert drop_captions(captions, uniforms, 1.0) == [""] * 4
