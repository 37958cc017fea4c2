"""Time grids: each against its definition or against diffusers, and all against what a grid must be."""

import math

import mpmath
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from helpers import schedules

from ldm.diffusion.paths import EDMPath, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.samplers import TIME_GRIDS, time_grid
from ldm.samplers.time_grids import ALIGNED_SD15, beta, grid_named

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
every_grid = pytest.mark.parametrize("grid", TIME_GRIDS)


@every_grid
@pytest.mark.parametrize("steps", [1, 2, 7, 30, 100])
def test_a_grid_falls_from_noise_to_data(grid, steps, path):
    if grid in ("leading", "ddim_uniform") and not hasattr(path, "num_train_timesteps"):
        with pytest.raises(ValueError, match=f"grid '{grid}' counts the entries of a table"):
            time_grid(path, steps, grid)
        return
    times = time_grid(path, steps, grid)
    if grid == "ddim_uniform":
        assert steps + 1 <= len(times) <= steps + 5
    else:
        assert len(times) == steps + 1
    assert times[-1] == 0 and (times.diff() < 0).all() and times[0] <= 1 and times.dtype == torch.float64
    if grid not in ("leading", "ddim_uniform", "align_your_steps"):
        assert times[0] == pytest.approx(1.0, abs=1e-9)


def test_times_may_be_given():
    assert time_grid(RectifiedFlowPath(), 2, (0.9, 0.3, 0.0)).tolist() == [0.9, 0.3, 0.0]


def test_trailing_on_rectified_flow_is_even():
    assert time_grid(RectifiedFlowPath(), 4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("steps", [1, 7, 20, 30, 50, 999, 1000])
@pytest.mark.parametrize(("grid", "spacing"), [("trailing", "trailing"), ("leading", "leading")])
def test_grids_of_a_table_against_diffusers(steps, grid, spacing):
    steps -= (grid, steps) == ("leading", 1000)  # with an offset of 1 there are 999
    scheduler = DDIMScheduler(**SD_BETAS, timestep_spacing=spacing, steps_offset=1)
    scheduler.set_timesteps(steps)
    path = ScaledLinearBetaPath()
    ours = path.timesteps(time_grid(path, steps, grid)[:-1])
    assert torch.allclose(ours, scheduler.timesteps[:steps].double(), rtol=0, atol=1e-9)


def test_linear_is_others_linspace():
    path = ScaledLinearBetaPath()
    scheduler = DDIMScheduler(**SD_BETAS, timestep_spacing="linspace")
    for steps in (2, 7, 50, 999, 1000):
        scheduler.set_timesteps(steps)
        ours = path.timesteps(time_grid(path, steps, "linear")[:-1]).long()
        # Halves between two entries are rounded here upwards, there to the even one.
        assert (ours - scheduler.timesteps).abs().max() <= (999 % (steps - 1) != 0)


def test_quadratic_is_even_in_the_root():
    times = time_grid(RectifiedFlowPath(), 5, "quadratic")
    steps = times[:-1].sqrt().diff()
    assert torch.allclose(steps, steps[0].expand(4))
    assert times[-2].item() == pytest.approx(0.001)


@pytest.mark.parametrize("grid", ["log_snr", "exponential"])
def test_even_steps_in_log_snr(grid, path):
    levels = path.log_snr(time_grid(path, 12, grid)[:-1])
    levels = levels[levels.isfinite()]
    assert (levels[0].item(), levels[-1].item()) == pytest.approx(path.log_snr_range, rel=1e-6)
    steps = levels.diff()
    assert len(steps) >= 10
    assert torch.allclose(steps, steps[0].expand(len(steps)), rtol=1e-6)


def test_karras_is_even_in_the_seventh_root(path):
    times = time_grid(path, 12, "karras")[:-1]
    roots = (-path.log_snr(times) / 14).exp()
    roots = roots[roots.isfinite()].diff()
    assert torch.allclose(roots, roots[0].expand(len(roots)), rtol=1e-6)


def test_karras_on_edms_path_is_its_papers():
    """sigma_i = (max^(1/7) + i / (N - 1) (min^(1/7) - max^(1/7)))^7, sigma_N = 0."""
    path, n = EDMPath(), 18
    ends = [80.0 ** (1 / 7), 0.002 ** (1 / 7)]
    expected = [(ends[0] + i / (n - 1) * (ends[1] - ends[0])) ** 7 for i in range(n)] + [0.0]
    assert path.sigma(time_grid(path, n, "karras")).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("steps", [4, 8, 100])
@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (0.8, 2.0)])
def test_beta_has_the_quantiles_of_its_distribution(steps: int, a: float, b: float):
    """The oracle is mpmath. The first pair is the grid's own, so it is left out of the call."""
    path = RectifiedFlowPath()
    times = time_grid(path, steps, "beta") if a == b else beta(path, steps, a, b)
    below = [float(mpmath.betainc(a, b, 0, t, regularized=True)) for t in times.tolist()]
    assert below == pytest.approx([1 - i / steps for i in range(steps + 1)], abs=1e-6, rel=0)


def test_ten_aligned_steps_are_those_published():
    path = ScaledLinearBetaPath()
    times = time_grid(path, 10, "align_your_steps")
    levels = (-path.log_snr(times[:-1]) / 2).exp()
    assert levels.tolist() == pytest.approx(list(ALIGNED_SD15[:-1]), rel=2e-3)
    # In diffusers' whole timesteps: the list that the paper gives for Stable Diffusion 1.5.
    published = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    assert path.timesteps(times[:-1]).tolist() == pytest.approx(published, abs=3.0)
    between = (-path.log_snr(time_grid(path, 20, "align_your_steps")[:-1]) / 2).exp().tolist()
    # The geometric means of neighbours, as the paper prints these.
    assert between[1] == pytest.approx(math.sqrt(14.615 * 6.475), rel=2e-3)
    assert between[-3:] == pytest.approx([math.sqrt(0.399 * 0.152), 0.152, math.sqrt(0.152 * 0.029)], rel=2e-3)


@pytest.mark.parametrize(
    ("steps", "grid", "message"),
    [
        (0, "linear", "steps must be 1 or more, not 0"),
        (1001, "linear", "grid linear has no 1001 different times on path scaled_linear_beta: use fewer"),
        (1000, "leading", "steps is 1000, more than the path has noise levels"),
        (10, "karas", "no time grid 'karas', did you mean karras. There are trailing, .*karras"),
        (10, "zzz", "no time grid 'zzz': There are trailing, .*karras"),
        (120, "quadratic", "grid quadratic has no 120 different times on path scaled_linear_beta: use fewer"),
        (3, (1.0, 0.5, 0.0), "the time grid has 3 times, expected one more than steps, 3"),
        (2, (1.0, 0.2, 0.5, 0.0), "the time grid is 1, 0.2, 0.5, 0, expected two or more times that fall"),
        (2, (1.2, 0.2, 0.0), "the time grid is 1.2, 0.2, 0, expected"),
        (1, (1.0, 0.2), "the time grid is 1, 0.2, expected"),
        (1, (0.0,), "the time grid is 0, expected"),
    ],
)
def test_impossible_grids_are_refused(steps, grid, message):
    with pytest.raises(ValueError, match=message):
        time_grid(ScaledLinearBetaPath(), steps, grid)


def test_leading_is_for_tables():
    with pytest.raises(ValueError, match="path rectified_flow has none: use trailing"):
        time_grid(RectifiedFlowPath(), 10, "leading")


@pytest.mark.parametrize(
    "grid",
    ["normal", "sgm_uniform", "simple", "ddim_uniform", "kl_optimal", "exponential", "polyexponential", "karras"],
)
@pytest.mark.parametrize("steps", [2, 7, 20, 30, 50])
def test_the_schedules_of_comfyui_and_a1111(grid, steps):
    """Their noise levels, and where these are entries of the table, the entries themselves."""
    path = ScaledLinearBetaPath()
    kept = (1 - path.betas()).cumprod(0).numpy()
    theirs = getattr(schedules, grid)(np.sqrt((1 - kept) / kept), steps)
    times = time_grid(path, steps, grid)
    ours = (path.sigma(times) / path.alpha(times)).tolist()
    assert ours == pytest.approx(theirs, rel=1e-9)
    if grid in ("simple", "ddim_uniform"):
        assert torch.equal(times, path.snap(times))


def test_ddims_grid_has_more_steps_where_they_do_not_divide():
    path = ScaledLinearBetaPath()
    assert [len(time_grid(path, steps, "ddim_uniform")) - 1 for steps in (7, 20, 30, 600)] == [8, 20, 31, 999]
    assert torch.equal(time_grid(path, 20, "ddim_uniform"), time_grid(path, 20, "leading"))


def test_normal_is_even_in_the_entries_next_to_pure_noise_too():
    path = ScaledLinearBetaPath(zero_terminal_snr=True)
    times = time_grid(path, 5, "normal")
    assert times[0] == 1 and times[-2].item() == pytest.approx(1e-3)
    assert path.timesteps(times[:-1]).tolist() == pytest.approx([999, 749.25, 499.5, 249.75, 0], abs=2e-3)
    between = time_grid(path, 1500, "sgm_uniform")
    assert between.isfinite().all() and between[1].item() == pytest.approx((1 + 999 * (1 - 1 / 1500)) / 1000)


def test_without_a_table_the_ways_through_one_are_even():
    path = RectifiedFlowPath()
    assert time_grid(path, 4, "simple").tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert torch.allclose(time_grid(path, 4, "normal"), time_grid(path, 4, "linear"))
    last = time_grid(path, 1000, "normal")[-2].item()
    assert time_grid(path, 2, "sgm_uniform").tolist() == pytest.approx([1, (1 + last) / 2, 0])


@pytest.mark.parametrize(
    ("word", "grid"),
    [
        ("Karras", "karras"), ("Exponential", "exponential"), ("SGM Uniform", "sgm_uniform"), ("Simple", "simple"),
        ("SGMUniform", "sgm_uniform"), ("Normal", "normal"), ("Uniform", "normal"), ("DDIM", "ddim_uniform"),
        ("Beta", "beta"), ("Polyexponential", "exponential"), ("Align Your Steps", "align_your_steps"),
        ("KL Optimal", "kl_optimal"), ("LOG-SNR", "log_snr"),
    ],
)  # fmt: skip
def test_a1111s_words_for_grids(word, grid):
    path = ScaledLinearBetaPath()
    assert grid_named(word) == grid
    assert torch.equal(time_grid(path, 6, word), time_grid(path, 6, grid))
