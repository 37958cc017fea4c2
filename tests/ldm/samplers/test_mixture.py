"""Every sampler draws a mixture of normals in two dimensions, of which the denoiser is known exactly."""

import pytest
import torch
from analytic import mixture, mixture_denoiser
from torch import Tensor

from ldm.diffusion.paths import CosinePath, RectifiedFlowPath
from ldm.samplers import SAMPLERS, time_grid

# lcm is for consistency models: it draws means from any other denoiser. ddpm_learned: see test_order.py.
DRAWS_DATA = [name for name in SAMPLERS if name not in ("lcm", "ddpm_learned")]


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|: 0 for one distribution alone. Szekely & Rizzo 2004."""

    def within(x: Tensor) -> Tensor:
        return torch.cdist(x, x).sum() / (len(x) * (len(x) - 1))

    return (2 * torch.cdist(a, b).mean() - within(a) - within(b)).item()


@pytest.mark.parametrize("name", DRAWS_DATA)
@pytest.mark.parametrize("flow", [True, False])
def test_every_sampler_draws_a_mixture(name, flow):
    """Against true samples, within twice what other true samples differ by, at most."""
    path = RectifiedFlowPath() if flow else CosinePath()
    times = time_grid(path, 200 if SAMPLERS[name].order > 1 else 600, "log_snr")
    start = torch.randn(1000, 2, generator=torch.Generator().manual_seed(5))
    one_for_each = [torch.Generator().manual_seed(1000 + i) for i in range(1000)]
    drawn = SAMPLERS[name].function(mixture_denoiser(path), start, path, times, one_for_each)
    true = mixture(4000, 0)
    chance = max(abs(energy_distance(mixture(1000, seed), true)) for seed in range(1, 9))
    assert energy_distance(drawn, true) < 2 * chance
    assert energy_distance(drawn * 1.1, true) > 2 * chance  # the test can fail
