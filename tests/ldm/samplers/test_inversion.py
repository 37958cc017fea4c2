"""A picture's noise, and the same picture from it again."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ldm.diffusion.paths import RectifiedFlowPath
from ldm.samplers import SAMPLERS, invert, time_grid


def bent(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser that is no line: E[x0 | x_t] of two points, +-1, on rectified flow."""
    return torch.tanh((1 - t) * x / t**2)


def test_the_noise_draws_the_picture_again(path):
    """For a smooth denoiser and a fine grid, to rounding."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        scale = (path.alpha(t) / (path.alpha(t) ** 2 + path.sigma(t) ** 2)).to(x)
        return 0.3 * torch.sin(x) + 0.6 * scale * x

    picture = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = time_grid(path, 60, "log_snr")[1:-1]
    noise = invert(denoise, picture, path, times, iterations=60)
    again = SAMPLERS["ddim"].function(denoise, noise, path, times, [])
    assert not torch.allclose(noise, picture, atol=0.1)
    assert torch.allclose(again, picture, atol=1e-6)


def test_one_iteration_comes_back_nearly_and_more_come_closer():
    path = RectifiedFlowPath()
    times = torch.linspace(0.95, 0.5, 30, dtype=torch.float64)
    picture = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = []
    for iterations in (1, 2, 4, 12):
        noise = invert(bent, picture, path, times, iterations=iterations)
        errors.append((SAMPLERS["ddim"].function(bent, noise, path, times, []) - picture).abs().max().item())
    assert errors[0] < 0.5
    assert all(later < 0.5 * earlier for earlier, later in pairwise(errors))


def test_what_cannot_be_inverted_is_refused():
    path, x = RectifiedFlowPath(), torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="times end at 0"):
        invert(bent, x, path, time_grid(path, 4))
    with pytest.raises(ValueError, match="iterations is 0"):
        invert(bent, x, path, time_grid(path, 4)[:-1], iterations=0)
