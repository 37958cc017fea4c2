"""The constants of diffusers' own tests, from our samplers.

Those tests (tests/schedulers/test_scheduler_*.py) draw from a toy network and compare sum and mean of |x|. Each of the
schedulers has its habits: which entries it visits, where its last step goes, what it clips. A Convention names them and
the Adapter mimics them; levels, conversions and steps are ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import pytest
import torch
from helpers.analytic import double, node_at
from torch import Tensor

from ldm.diffusion.nodes import Step, variance_range
from ldm.diffusion.paths import EDMPath, LinearBetaPath, ScaledLinearBetaPath
from ldm.diffusion.predictions import to_x0
from ldm.samplers import SAMPLERS, invert, time_grid
from ldm.samplers.linear_multistep import adams

RAMP = (torch.arange(768).double().reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)
NOISE = RAMP.max() - RAMP


@dataclass(frozen=True, kw_only=True)
class TheirTable(LinearBetaPath):
    """Our table with alpha_bar in float32, in which the first sigma^2, 1e-4, is wrong from its fourth digit on; and
    with the timesteps between entries from log(sigma / alpha), not from log alpha_bar."""

    def betas(self) -> Tensor:
        alpha_bar = (1 - super().betas().float()).cumprod(0).double()
        return 1 - alpha_bar / torch.cat([double(1), alpha_bar[:-1]])

    def timesteps(self, t: Tensor) -> Tensor:
        n = self.num_train_timesteps
        below = (n * t).floor().clamp(1, n - 1)
        left, here, right = self.log_snr(torch.stack([below / n, t, (below + 1) / n]))
        return below - 1 + ((left - here) / (left - right)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class MixingV(TheirTable):
    """Their PNDM takes the mean of v, and of that the noise: it is our PNDM, given v for the noise, on this path.

    With alpha = cos w and sigma = sin w, DDIM's step turns: x' = cos(w - w') x - sin(w - w') v. That is our step
    a' / a (x - s v) + s' v if over each step a' = a cos(w - w') and s' = s cos(w - w') - sin(w - w').
    """

    visited: tuple[float, ...]

    def turned(self, t: Tensor) -> tuple[Tensor, Tensor]:
        a, s = torch.ones_like(t), torch.full_like(t, 10.0)  # any start will do
        for start, end in pairwise(double(*self.visited)):
            between = torch.stack([start.expand_as(t), t.clamp(end, start)])
            w, w_next = torch.atan2(super().sigma(between), super().alpha(between))
            a, s = a * (w - w_next).cos(), s * (w - w_next).cos() - (w - w_next).sin()
        return a, s

    def alpha(self, t: Tensor) -> Tensor:
        return self.turned(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        return self.turned(t)[1]


ENTRY_0 = 1e-3  # the time of the first of a thousand entries
STAYS = ENTRY_0 * (1 - 1e-9)  # from there a step to itself, which for us may not be without length
ABOVE_DATA = 1e-12  # for what must not be our DDIM step to sigma = 0, or divides by sigma


@dataclass(frozen=True, kw_only=True)
class Convention:
    visits: str | Callable[[int, int], Tensor]  # one of our time grids, or N and steps to timesteps
    end: float = 0.0  # the time that the last step goes to
    path: Any = TheirTable()
    clip: Literal["", "x0", "eps kept"] = ""  # x0_hat to [-1, 1]; "eps kept": the noise is not what it then implies
    scaled: bool = False  # samples are x / alpha, and the test's loop goes on from what it scaled for the network
    scales_input: bool = False  # for the network alone
    size: float = 1.0  # of the first sample; where scaled, sigma / alpha
    first_order_last: bool = False
    boundary: bool = False  # a consistency model's: some of x is in the answer
    inverse: bool = False  # from data to noise; the network is told the time that the step goes to

    def times(self, steps: int) -> Tensor:
        if isinstance(self.visits, str):
            return torch.cat([time_grid(self.path, steps, self.visits)[:-1], double(self.end)])
        n = self.path.num_train_timesteps
        timesteps = self.visits(n, steps).double()
        below = timesteps.long().clamp(max=n - 2)
        ratio = (-self.path.log_snr((torch.arange(n).double() + 1) / n) / 2).exp()
        ratio = torch.lerp(ratio[below], ratio[below + 1], timesteps - below)  # sigma / alpha is linear in between
        return torch.cat([self.path.time_of_log_snr(-2 * ratio.log()), double(self.end)])


DDPM = Convention(visits="trailing", clip="x0")
LCM = Convention(visits="trailing", path=ScaledLinearBetaPath(), boundary=True)
DDIM = Convention(visits=lambda n, steps: torch.arange(steps - 1, -1, -1) * (n // steps), clip="eps kept")
DDIM_1 = replace(DDIM, path=TheirTable(beta_start=0.01))
INVERSE = replace(DDIM, end=ABOVE_DATA, inverse=True)
PNDM = replace(DDIM, end=STAYS, clip="")
PNDM_V = replace(PNDM, path=MixingV(visited=tuple(PNDM.times(10).tolist())))
DPM = Convention(visits=lambda n, steps: torch.linspace(n - 1, 0, steps + 1).round()[:-1], end=ENTRY_0)
DPM_LAST = replace(DPM, first_order_last=True)
SIGMAS = Convention(
    visits=lambda n, steps: torch.linspace(n - 1, 0, steps, dtype=torch.float64),
    path=TheirTable(num_train_timesteps=1100),
    scaled=True,
)
LMS = replace(SIGMAS, end=ABOVE_DATA)
EDM = Convention(visits="karras", path=EDMPath(), scales_input=True, size=(80**2 + 1) ** 0.5)
EDM_DPM = Convention(visits="karras", path=EDMPath(), end=(0.002 / 80) ** (1 / 7) * (1 - 1e-9))


@dataclass
class Adapter:
    """The network behind a convention, as the function that our samplers ask for x0_hat."""

    convention: Convention
    prediction: Literal["eps", "v"]
    times: Tensor
    evaluations: int  # of a step
    calls: int = 0
    answer: Tensor = RAMP

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """x0_hat. At a step's first evaluation x becomes what theirs goes on from: clipping, and the loop that scales,
        change the sample itself. Later in a step x is left, and x0_hat such that the noise is theirs."""
        if self.convention.first_order_last and t == self.times[-2]:
            return self.answer
        sample, x0 = self.theirs(x, t)
        if self.calls % self.evaluations == 0:
            x.copy_(sample)
        else:
            x0 = x0 + (x - sample) / self.convention.path.alpha(t)
        self.calls += 1
        self.answer = x0
        return x0

    def theirs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Their sample, and x0_hat of it."""
        habits, path, kind = self.convention, self.convention.path, self.prediction
        held = self.times[int((self.times == t).nonzero()) + 1] if habits.inverse else t  # whose level x has
        alpha, sigma, timestep = path.alpha(held), path.sigma(held), path.timesteps(t)
        output = (x * path.input_scale(t) if habits.scales_input else x) * timestep / (timestep + 1)  # the toy network
        if isinstance(path, EDMPath):
            kind, output = "edm", output if kind == "eps" else -output  # v is F turned round
        sample = alpha * x if habits.scaled else x
        x0 = to_x0(kind, output, sample, path, held)
        if habits.clip:
            eps, x0 = (sample - alpha * x0) / sigma, x0.clamp(-1, 1)
            sample = alpha * x0 + sigma * eps if habits.clip == "eps kept" else sample
        if habits.boundary:
            large = 10 * timestep
            x0 = large / (large**2 + 0.25).sqrt() * x0 + 0.25 / (large**2 + 0.25) * x
        return sample, x0


class Row(NamedTuple):
    name: str
    sampler: str
    convention: Convention
    steps: int
    prediction: Literal["eps", "v"]
    total: float | None  # of |x|, where published
    mean: float
    tolerance: float  # of the total, or else of the mean
    begin: int = 0  # if above 0, the step to begin with, from the ramp with the noise of its level


BESIDE: dict[str, Callable[..., Tensor]] = {
    "deis_2": lambda f, x, path, times, _: adams(f, x, path, times, order=2, variable=torch.log),  # `deis` has order 3
    "invert": lambda f, x, path, times, _: invert(f, x, path, times, iterations=1),
}


def drawn(row: Row) -> Tensor:
    habits, path, times = row.convention, row.convention.path, row.convention.times(row.steps)
    if habits.first_order_last:  # asked twice at one place and answered alike, no method has a change to carry on
        times = torch.cat([times[:-1], times[-2:-1] - 1e-9, times[-1:]])
    alpha, ratio = path.alpha(times), path.sigma(times) / path.alpha(times)
    x = (ratio[0] if habits.scaled else habits.size) * RAMP + (ratio[row.begin] * NOISE if row.begin else 0)
    if row.begin or habits.scaled:
        x = alpha[row.begin] * x
    sampler = SAMPLERS.get(row.sampler)
    adapter = Adapter(habits, row.prediction, times, sampler.evaluations if sampler else 1)
    generators = [torch.Generator().manual_seed(0)] * len(x)  # one for all: theirs draws for the batch at once
    function = sampler.function if sampler else BESIDE[row.sampler]
    return function(adapter, x, path, times[row.begin :], generators)


# Of the tolerances most is taken by their float32, which in DDPM's coefficients leaves four digits near the data.
ROWS = [
    Row("DDPM", "ddpm", DDPM, 1000, "eps", 258.9606, 0.3372, 2e-3),
    Row("DDPM v", "ddpm", DDPM, 1000, "v", 202.0296, 0.2631, 2e-3),
    Row("DDPM late", "ddpm", DDPM, 1000, "eps", 387.9466, 0.5051, 3e-2, begin=998),
    Row("DDIM", "ddim", DDIM, 10, "eps", 172.0067, 0.223967, 1e-4),
    Row("DDIM v", "ddim", DDIM, 10, "v", 52.5302, 0.0684, 1e-4),
    Row("DDIM late", "ddim", DDIM, 10, "eps", 354.5418, 0.4616, 1e-4, begin=8),
    Row("DDIM set_alpha_to_one", "ddim", DDIM_1, 10, "eps", 149.8295, 0.1951, 1e-4),
    Row("DDIM not set_alpha_to_one", "ddim", replace(DDIM_1, end=STAYS), 10, "eps", 149.0784, 0.1941, 1e-4),
    Row("DDIM inverse", "invert", INVERSE, 10, "eps", 671.6816, 0.8746, 2e-4),
    Row("DDIM inverse v", "invert", INVERSE, 10, "v", 1394.2185, 1.8154, 4e-4),
    Row("PNDM", "pndm", PNDM, 10, "eps", 198.1318, 0.2580, 2e-4),
    Row("PNDM v", "pndm", PNDM_V, 10, "eps", 67.3986, 0.0878, 1e-4),  # v counts as the noise
    Row("LMS", "lms", LMS, 10, "eps", 1006.388, 1.31, 1e-3),
    Row("LMS v", "lms", LMS, 10, "v", 0.0017, 2.2676e-6, 5e-5),
    Row("Euler", "euler", SIGMAS, 10, "eps", 10.0807, 0.0131, 1e-4),
    Row("Euler Karras", "euler", replace(SIGMAS, visits="karras"), 10, "eps", 124.523, 0.16214, 1e-3),
    Row("Euler v", "euler", SIGMAS, 10, "v", 0.0002, 2.2676e-6, 3e-4),
    Row("Euler late", "euler", SIGMAS, 10, "eps", 57062.93, 74.3007, 1e-2, begin=8),
    Row("Euler a", "euler_ancestral", SIGMAS, 10, "eps", 152.3192, 0.1983, 1e-4),
    Row("Euler a v", "euler_ancestral", SIGMAS, 10, "v", 108.4439, 0.1412, 1e-4),
    Row("Euler a late", "euler_ancestral", SIGMAS, 10, "eps", 56163.05, 73.1290, 2e-2, begin=8),
    Row("Heun", "heun", SIGMAS, 10, "eps", 0.1233, 0.0002, 1e-4),
    Row("Heun late", "heun", SIGMAS, 10, "eps", 75074.89, 97.7538, 2e-2, begin=8),
    Row("KDPM2", "dpm2", SIGMAS, 10, "eps", 20.4125, 0.0266, 1e-4),
    Row("KDPM2 late", "dpm2", SIGMAS, 10, "eps", 70408.41, 91.6776, 2e-2, begin=8),
    Row("DPM++ 2M", "dpmpp_2m", DPM, 10, "eps", None, 0.3301, 1e-4),
    Row("DPM++ 2M v", "dpmpp_2m", DPM, 10, "v", None, 0.2251, 1e-5),
    Row("DPM++ 2M late", "dpmpp_2m", DPM, 10, "eps", 318.4111, 0.4146, 1e-4, begin=5),
    Row("UniPC", "unipc_2", DPM_LAST, 10, "eps", None, 0.2464, 1e-5),
    Row("UniPC v", "unipc_2", DPM_LAST, 10, "v", None, 0.1014, 1e-5),
    Row("UniPC late", "unipc_2", DPM_LAST, 10, "eps", 315.5757, 0.4109, 1e-4, begin=8),
    Row("DEIS", "deis_2", DPM_LAST, 10, "eps", None, 0.23916, 1e-5),
    Row("DEIS v", "deis_2", DPM_LAST, 10, "v", None, 0.091, 1e-4),
    Row("DEIS late", "deis_2", DPM_LAST, 10, "eps", 315.3016, 0.41054, 1e-4, begin=8),
    Row("EDM Euler", "euler", EDM, 10, "eps", 34.1855, 0.044, 1e-4),
    Row("EDM DPM++", "dpmpp_2m", EDM_DPM, 10, "eps", None, 0.0001, 1e-4),
    Row("EDM DPM++ v", "dpmpp_2m", EDM_DPM, 10, "v", None, 0.0092, 1e-4),
    Row("EDM DPM++ late", "dpmpp_2m", EDM_DPM, 10, "eps", 8.1661, 0.0106, 1e-4, begin=5),
    Row("LCM one step", "lcm", LCM, 1, "eps", 18.7097, 0.0244, 2e-4),
    Row("LCM", "lcm", LCM, 10, "eps", 197.7616, 0.2575, 1e-4),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_published_constants(row: Row):
    sizes = drawn(row).abs()
    if row.total is not None:
        assert abs(sizes.sum().item() - row.total) <= row.tolerance
    assert abs(sizes.mean().item() - row.mean) <= (row.tolerance if row.total is None else 6e-4)


def test_published_variances():
    for i, j, variance in [(487, 486, 0.00979), (999, 998, 0.02), (420, 400, 0.14771), (980, 960, 0.3246)]:
        step = Step(*(node_at(LinearBetaPath(), double((entry + 1) / 1000)) for entry in (i, j)))
        assert abs(variance_range(step)[0] - variance) <= 1e-5
