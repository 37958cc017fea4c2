"""Time grids of stock schedulers: they round as numpy does, and follow each class of diffusers'."""

from __future__ import annotations

import importlib
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from ldm.diffusion import ScaledLinearBetaPath
from ldm.samplers.stock.grids import arange_down, beta_quantiles, linspace
from ldm.samplers.stock.plan import grid_of, table_of
from ldm.samplers.stock.scheduler import CLASSES, stock_scheduler

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TWICE = {"HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}


def test_counting_down_and_even_numbers_are_numpys():
    for steps in range(1, 1001):
        assert arange_down(1000, 1000 / steps) == np.arange(1000, 0, -1000 / steps).tolist()
        assert linspace(0, 999, steps) == np.linspace(0, 999, steps).tolist()


def test_the_beta_quantiles_are_scipys():
    scipy_stats: Any = importlib.import_module("scipy.stats")
    fractions = torch.tensor(linspace(0, 1, 101), dtype=torch.float64)
    expected = torch.tensor(scipy_stats.beta.ppf(fractions.numpy(), 0.6, 0.6))
    torch.testing.assert_close(beta_quantiles(fractions), expected, rtol=0, atol=1e-12)


# PNDM and LCM visit their timesteps in an order of their own: see tests/interop.
@pytest.mark.parametrize("kind", sorted(CLASSES.keys() - {"PNDMScheduler"}))
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_and_levels_are_those_of_diffusers(kind, spacing):
    theirs = getattr(diffusers, kind).from_config(SD_BETAS | {"timestep_spacing": spacing})
    scheduler = stock_scheduler(kind, dict(theirs.config))
    table = table_of(scheduler, ScaledLinearBetaPath())
    for steps in (1, 2, 3, 5, 7, 12, 30, 31, 48, 50, 64, 99, 333):
        if kind == "LCMScheduler" and steps > 50:
            continue
        theirs.set_timesteps(steps)
        ours = grid_of(scheduler, table, steps)
        expected = theirs.timesteps[:: 2 if kind in TWICE else 1].double()
        torch.testing.assert_close(torch.tensor(ours.timesteps, dtype=torch.float64), expected, rtol=1e-7, atol=0)
        if ours.kappas:
            levels = theirs.sigmas[[0, *range(1, len(theirs.sigmas), 2)]] if kind in TWICE else theirs.sigmas
            levels = levels[: steps + 1].double()
            torch.testing.assert_close(torch.tensor(ours.kappas, dtype=torch.float64), levels, rtol=2e-7, atol=0)


def test_a_table_is_diffusers_to_the_last_bit():
    theirs: Any = diffusers.EulerDiscreteScheduler.from_config(SD_BETAS)
    scheduler = stock_scheduler("EulerDiscreteScheduler", dict(theirs.config))
    expected = ((1 - theirs.alphas_cumprod) / theirs.alphas_cumprod) ** 0.5
    assert table_of(scheduler, ScaledLinearBetaPath()).kappas == expected.tolist()
