"""What every sampler promises: one answer in one step, pictures apart from their batch, inputs left alone."""

from functools import partial

import pytest
import torch
from helpers.analytic import MEAN, STD, double, generators, ideal_denoiser
from torch import Tensor

from ldm.diffusion.paths import EDMPath, RectifiedFlowPath, ScaledLinearBetaPath
from ldm.samplers import SAMPLERS, SamplerFunction, noise_like, time_grid

every_sampler = pytest.mark.parametrize("name", SAMPLERS)
OWN_NODES = ("dpm_fast", "dpm_adaptive")  # they take only the range from the grid


def drawing_with(name: str) -> SamplerFunction:
    """The sampler, with some variance where it needs one."""
    return SAMPLERS[name].with_options(variance=lambda: torch.zeros(()))


@every_sampler
def test_one_step_is_the_denoisers_answer(name, path):
    x = noise_like(torch.empty(2, 3, 4, 5), generators(1, 2))
    denoise = ideal_denoiser(path)
    answer = drawing_with(name)(denoise, x, path, time_grid(path, 1), generators(1, 2))
    assert torch.allclose(answer, denoise(x, double(1.0)[0]).float(), atol=1e-6)
    assert answer.dtype == torch.float32 and answer.shape == x.shape


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if not sampler.one_by_one])
@pytest.mark.parametrize("start", [1.0, 0.6])
def test_picture_does_not_depend_on_its_batch(name, path, start):
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x * (1.5 - t) + x.mean(dim=(1, 2, 3), keepdim=True))

    times = time_grid(path, 7)
    times = times[times <= start]
    x = noise_like(torch.empty(3, 4, 6, 5), generators(10, 11, 12))
    together = drawing_with(name)(denoise, x, path, times, generators(20, 21, 22))
    for i in range(3):
        alone = drawing_with(name)(denoise, x[i : i + 1], path, times, generators(20 + i))
        assert torch.equal(alone[0], together[i])


@every_sampler
def test_generators_matter_only_where_stochastic(name):
    path, x = RectifiedFlowPath(), torch.ones(1, 1, 2, 2)
    times = time_grid(path, 24)  # restart has no restarts below twenty
    pictures = [drawing_with(name)(ideal_denoiser(path), x, path, times, generators(seed)) for seed in (0, 0, 1)]
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2]) != SAMPLERS[name].stochastic


@every_sampler
def test_each_node_but_the_last_is_evaluated_and_inputs_are_left_alone(name):
    path, x, seen = ScaledLinearBetaPath(), torch.ones(2, 1, 2, 2), []
    times = time_grid(path, 6)
    copies = x.clone(), times.clone()

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        before = x_t.clone()
        answer = ideal_denoiser(path)(x_t, t)
        seen.append((t.item(), x_t, before, answer, answer.clone()))
        return answer

    drawing_with(name)(denoise, x, path, times, generators(0, 1))
    visited = [t for t, *_ in seen]
    sampler = SAMPLERS[name]
    if name != "dpm_adaptive":  # it takes as many as it needs
        assert len(visited) == 5 * sampler.evaluations + 1 + sampler.more_at_first
    if name in OWN_NODES:
        assert visited[0] == times[0] and all(times[-2] <= t for t in visited)
    else:
        assert list(dict.fromkeys(t for t in visited if t in times)) == times[:-1].tolist()
    assert torch.equal(x, copies[0]) and torch.equal(times, copies[1])
    for _, x_t, x_before, answer, answer_before in seen:
        assert torch.equal(x_t, x_before) and torch.equal(answer, answer_before)


def test_a_picture_of_dpm_adaptive_depends_on_its_batch():
    """That is why it is drawn alone: see test_a_picture_is_the_same_alone_and_in_a_batch of the pipeline."""
    path, x = ScaledLinearBetaPath(), noise_like(torch.empty(2, 1, 4, 4), generators(0, 1))
    draw = partial(SAMPLERS["dpm_adaptive"].function, lambda x, t: torch.tanh(3 * x))
    together = draw(torch.stack([x[0], 50 * x[1]]), path, time_grid(path, 5), generators(2, 3))
    assert not torch.allclose(draw(x[:1], path, time_grid(path, 5), generators(2))[0], together[0])
    assert [name for name, sampler in SAMPLERS.items() if sampler.one_by_one] == ["dpm_adaptive"]


@every_sampler
def test_many_steps_stay_finite(name, path):
    x = noise_like(torch.empty(1, 1, 2, 2), generators(0))
    times = time_grid(path, 250).float()
    answer = drawing_with(name)(ideal_denoiser(path), x, path, times, generators(0))
    assert answer.isfinite().all() and (answer - MEAN).abs().max() < 5 * STD


def test_noise_comes_from_each_images_generator():
    noise = noise_like(torch.empty(2, 3, 4, dtype=torch.bfloat16), generators(3, 4))
    assert noise.dtype == torch.bfloat16
    for row, generator in zip(noise, generators(3, 4), strict=True):
        assert torch.equal(row, torch.randn(3, 4, generator=generator).bfloat16())
    with pytest.raises(ValueError, match="1 generators for 2 images"):
        noise_like(torch.empty(2, 3, 4), generators(0))


def test_labels_are_unique():
    assert len({sampler.label for sampler in SAMPLERS.values()}) == len(SAMPLERS)


def test_times_that_leave_no_noise_are_refused():
    path, x = EDMPath(), torch.ones(1, 1, 2, 2)
    with pytest.raises(ValueError, match="some of which leave no noise"):
        SAMPLERS["heun"].function(ideal_denoiser(path), x, path, double(1.0, 1e-60, 0.0), generators(0))


def test_times_that_are_no_grid_are_refused():
    path, x = ScaledLinearBetaPath(), torch.ones(1, 1, 2, 2)
    for times in (double(1.0), double(0.0, 1.0), double(0.5, 0.5, 0.0), double(1.5, 0.0), double(0.5, -0.1)):
        with pytest.raises(ValueError, match="times must"):
            SAMPLERS["euler"].function(ideal_denoiser(path), x, path, times, generators(0))


@pytest.mark.parametrize("name", [name for name, sampler in SAMPLERS.items() if sampler.eta is not None])
def test_eta_is_a_share_of_noise(name):
    path, sampler = RectifiedFlowPath(), SAMPLERS[name]
    x, times = noise_like(torch.empty(1, 1, 4, 4), generators(0)), time_grid(path, 5)
    without, own, half, most = (
        [sampler.with_eta(eta)(ideal_denoiser(path), x, path, times, generators(seed)) for seed in (1, 2)]
        for eta in (0.0, None, 0.5, 1.0)
    )
    assert torch.equal(*without) and not torch.equal(*half) and not torch.equal(*most)
    assert sampler.eta in (0.0, 1.0) and torch.equal(own[0], (most if sampler.eta else without)[0])
    for eta in (-0.1, 1.5):
        with pytest.raises(ValueError, match=f"eta is {eta}, expected 0"):
            sampler.with_eta(eta)
        with pytest.raises(ValueError, match=f"eta is {eta}, expected 0"):
            sampler.function(ideal_denoiser(path), x, path, times, generators(0), eta=eta)  # pyright: ignore[reportCallIssue]


def test_eta_where_there_is_none_is_refused():
    assert SAMPLERS["dpmpp_2m"].with_eta(None) is SAMPLERS["dpmpp_2m"].function
    with pytest.raises(ValueError, match=r"sampler DPM\+\+ 2M has no eta: .* ddim, euler_ancestral"):
        SAMPLERS["dpmpp_2m"].with_eta(0.5)


def test_ddpm_learned_needs_a_network_that_has_learned():
    SAMPLERS["ddpm_learned"].check(learned=True)
    for name in SAMPLERS.keys() - {"ddpm_learned"}:
        SAMPLERS[name].check(learned=False)
    with pytest.raises(ValueError, match="DDPM learned needs a network that has learned its variance: use ddpm"):
        SAMPLERS["ddpm_learned"].check(learned=False)
