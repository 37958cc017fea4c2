"""Our samplers are k-diffusion's and A1111's of the same name: on the same levels, with the same noise, to 1e-9."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from helpers import k_diffusion
from helpers.analytic import double, generators
from torch import Tensor

from ldm.diffusion.paths import EDMPath, PathConfig, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.samplers import SAMPLERS, time_grid

PATHS = [ScaledLinearBetaPath(), EDMPath()]
THEIRS: dict[str, Callable[..., Tensor]] = {
    "euler": partial(k_diffusion.euler_ancestral, eta=0.0),
    "euler_ancestral": k_diffusion.euler_ancestral,
    "heun": k_diffusion.heun,
    "dpm2": partial(k_diffusion.dpm_2_ancestral, eta=0.0),
    "dpmpp_2s_ancestral": k_diffusion.dpmpp_2s_ancestral,
    "dpmpp_2m": k_diffusion.dpmpp_2m,
    "dpmpp_2m_sde": k_diffusion.dpmpp_2m_sde,
    "lms": k_diffusion.lms,
    "dpm2_ancestral": k_diffusion.dpm_2_ancestral,
    "dpmpp_sde": k_diffusion.dpmpp_sde,
    "dpmpp_2m_sde_heun": partial(k_diffusion.dpmpp_2m_sde, solver_type="heun"),
    "dpmpp_3m_sde": k_diffusion.dpmpp_3m_sde,
    "dpm_fast": k_diffusion.dpm_fast,
    "dpm_adaptive": k_diffusion.dpm_adaptive,
    "restart": k_diffusion.restart,
}


def bent(y: Tensor, kappa: float) -> Tensor:
    """A denoiser that depends on x and on the level, smoothly and in no simple way."""
    return 0.9 * torch.tanh(1.7 * y / math.sqrt(1 + kappa**2) + 0.3 * math.sin(3 * math.log(kappa)))


class Noise:
    """Float64 draws in order, for both programs."""

    def __init__(self, size: Sequence[int]) -> None:
        self.size, self.generator = size, torch.Generator().manual_seed(3)

    def __call__(self, *_: object) -> Tensor:
        return torch.randn(*self.size, generator=self.generator, dtype=torch.float64)


def both(name: str, path: PathConfig, times: Tensor, monkeypatch: pytest.MonkeyPatch, **eta: float) -> list[Tensor]:
    levels = (path.sigma(times) / path.alpha(times)).tolist()
    y = levels[0] * Noise((2, 1, 4, 4))()

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return bent(x / path.alpha(t), (path.sigma(t) / path.alpha(t)).item())

    with monkeypatch.context() as patch:
        patch.setattr("ldm.samplers.steps.noise_like", Noise(y.shape))
        ours = SAMPLERS[name].with_eta(eta.get("eta"))(denoise, path.alpha(times[0]) * y, path, times, [])
    return [ours, THEIRS[name](bent, y, levels, Noise(y.shape), **eta)]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.kind)
@pytest.mark.parametrize("steps", [3, 8, 24, 31, 40])
@pytest.mark.parametrize("grid", ["karras", "exponential"])
@pytest.mark.parametrize(
    ("name", "eta"),
    [(name, {}) for name in THEIRS]
    + [(name, {"eta": eta}) for name in THEIRS if SAMPLERS[name].eta is not None for eta in (0.0, 0.5)],
)
def test_the_same_pictures(name, eta, grid, steps, path, monkeypatch):
    ours, theirs = both(name, path, time_grid(path, steps, grid), monkeypatch, **eta)
    assert theirs.std() > 0.1
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def test_the_exact_third_order_is_another_method(monkeypatch):
    times = time_grid(PATHS[0], 8, "karras")
    _, theirs = both("dpmpp_3m_sde", PATHS[0], times, monkeypatch)
    monkeypatch.setitem(THEIRS, "dpmpp_3m_sde_exact", k_diffusion.dpmpp_3m_sde)
    ours, _ = both("dpmpp_3m_sde_exact", PATHS[0], times, monkeypatch)
    assert (ours - theirs).abs().max() > 1e-3 * theirs.abs().max()


def test_restarts_make_no_more_steps():
    """Twenty steps and more: nine of them again from kappa near 2, or twice a quarter of them."""
    path = ScaledLinearBetaPath()
    for steps, times_again, again in ((19, 0, 0), (20, 1, 9), (35, 1, 9), (36, 2, 9), (50, 2, 12)):
        seen: list[float] = []

        def denoise(x: Tensor, t: Tensor, seen: list[float] = seen) -> Tensor:
            seen.append(t.item())
            return x / 2

        x = torch.ones(1, 1, 1, 2, dtype=torch.float64)
        SAMPLERS["restart"].function(denoise, x, path, time_grid(path, steps, "karras"), generators(0))
        assert len(seen) == 2 * steps - 1
        starts = seen[::2]  # of the steps
        rises = [i for i in range(1, steps) if starts[i] > starts[i - 1]]
        assert len(rises) == times_again and all(b - a == again for a, b in zip(rises, rises[1:], strict=False))
        levels = [(path.sigma(double(starts[i])) / path.alpha(double(starts[i]))).item() for i in rises]
        assert all(1.5 < level < 2.5 for level in levels)


def test_a_range_without_the_low_levels_has_no_restart():
    """As of a picture that is started from: where no level is near 2, or none is near 0.1."""
    path, x = ScaledLinearBetaPath(), torch.ones(1, 1, 1, 2, dtype=torch.float64)
    times = path.time_of_log_snr(2 * torch.linspace(2.5, 3.4, 25, dtype=torch.float64))
    function = partial(SAMPLERS["restart"].function, lambda x, t: x / 2, x, path, torch.cat([times, double(0.0)]))
    assert torch.equal(function(generators(0)), function(generators(1)))


@pytest.mark.parametrize("name", ["dpm_fast", "dpm_adaptive"])
def test_the_noise_of_the_last_level_stays(name):
    """As in A1111 and ComfyUI. From pure noise the first step is DDIM's, and a single step is the denoiser's output."""
    path, data = ScaledLinearBetaPath(), torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    times = time_grid(path, 12, "exponential")
    x = double(-1.0, 1.0).view(1, 1, 1, 2)
    found = SAMPLERS[name].with_eta(0.0)(lambda x, t: data, x, path, times, generators(0))
    last = (path.sigma(times[-2]) / path.alpha(times[-2])).item()
    first = path.sigma(times[0]) / path.alpha(times[0])
    assert torch.allclose(found, data + last / first * (x / path.alpha(times[0]) - data), rtol=1e-9)
    for short in (double(1.0, 0.3), double(1.0, 0.3, 0.0), double(0.9, 0.3)):
        flow = RectifiedFlowPath()
        found = SAMPLERS[name].with_eta(0.0)(lambda x, t: data, x, flow, short, generators(0))
        assert torch.allclose(found, (1 - short[-1]) * data + short[-1] / short[0] * (x - (1 - short[0]) * data))


def test_what_is_not_finite_ends_dpm_adaptive():
    path, x = ScaledLinearBetaPath(), torch.ones(1, 1, 1, 2)
    found = SAMPLERS["dpm_adaptive"].function(lambda x, t: x * math.nan, x, path, time_grid(path, 5), generators(0))
    assert found.isnan().all()
