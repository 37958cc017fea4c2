"""Time grids: the times of a path at which a sampler evaluates the denoiser.

All end at t = 0 and start at t = 1, except those made for Stable Diffusion (leading, align_your_steps). Grids in
log-SNR lie between the path's finite ends (log_snr_range); if the path starts from pure noise, t = 1 is an additional
node before them.

normal, simple, sgm_uniform and ddim_uniform are ComfyUI's and A1111's ways through a table of noise levels. On paths
without a table the first three are even in t, as they are within a table's rounding.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.paths import PathConfig
from ldm.diffusion.table_paths import BetaTablePath
from ldm.files.messages import unknown_name
from ldm.samplers.names import squeezed

Grid = Callable[[PathConfig, int], Tensor]


def time_grid(path: PathConfig, steps: int, grid: str | Sequence[float] | None = None) -> Tensor:
    """Return steps + 1 times, float64, strictly decreasing to 0; of ddim_uniform, see there.

    grid: a name that grid_named takes, or the times themselves; None: the path's default. Raises ValueError, naming
    the invalid value.
    """
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, not {steps}")
    grid = path.default_grid if grid is None else grid
    if not isinstance(grid, str):
        return explicit_times(steps, grid)
    grid = grid_named(grid)
    times = TIME_GRIDS[grid](path, steps)
    if not (times[:-1] > times[1:]).all():
        raise ValueError(
            f"grid {grid} has no {steps} different times on path {path.kind}: use fewer steps, or trailing"
        )
    return times


def grid_named(name: str) -> str:
    """Return the key of TIME_GRIDS for a key or A1111's "Schedule type", in any case and spacing.

    Raises ValueError, which suggests the nearest, for an unknown name.
    """
    known = {squeezed(key): key for key in TIME_GRIDS} | SCHEDULE_TYPES
    if squeezed(name) not in known:
        raise unknown_name("time grid", name, {key: key for key in TIME_GRIDS})
    return known[squeezed(name)]


def explicit_times(steps: int, times: Sequence[float]) -> Tensor:
    """Convert the times. Raises ValueError unless they are steps + 1, strictly decreasing from at most 1 to 0."""
    check_falling(times)
    if len(times) != steps + 1:
        raise ValueError(f"the time grid has {len(times)} times, expected one more than steps, {steps}")
    return torch.tensor(times, dtype=torch.float64)


def check_falling(times: Sequence[float]) -> None:
    """Raise ValueError unless the times decrease strictly from at most 1 to 0."""
    falling = all(later < earlier for earlier, later in pairwise(times))
    if len(times) < 2 or not falling or times[0] > 1 or times[-1] != 0:
        shown = ", ".join(f"{t:g}" for t in times)
        raise ValueError(f"the time grid is {shown}, expected two or more times that fall from at most 1 to 0")


def cleanest_time(path: PathConfig) -> Tensor:
    """Return the last time before the data at which the path is trained, 0-d float64."""
    return path.time_of_log_snr(torch.tensor(path.log_snr_range[1], dtype=torch.float64))


def trailing(path: PathConfig, steps: int) -> Tensor:
    """Even in t from 1 to 0, moved to the times at which the path was trained.

    On a table path it starts at the last noise level and is even in its entries. Lin et al. 2023 (arXiv 2305.08891),
    section 3.3.
    """
    return path.snap(torch.arange(steps, -1, -1, dtype=torch.float64) / steps)


def linear(path: PathConfig, steps: int) -> Tensor:
    """Even in t from 1 to the cleanest time of training, and then 0: "linspace" in diffusers."""
    return _to_the_cleanest(path, steps, power=1)


def leading(path: PathConfig, steps: int) -> Tensor:
    """Entries 0, N // steps, 2 (N // steps), ... of a table, shifted by one, as Stable Diffusion 1 and 2 use.

    It starts below the last noise level, so that its pure noise differs slightly from training. Rombach et al. 2022, in
    their code; steps_offset = 1.
    """
    n = table_size(path, "leading")
    if steps > n - 1:
        raise ValueError(f"steps is {steps}, more than the path has noise levels; use fewer")
    entries = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (n // steps) + 1
    return torch.cat([(entries + 1) / n, torch.zeros(1, dtype=torch.float64)])


def ddim_uniform(path: PathConfig, steps: int) -> Tensor:
    """Entries 1, 1 + N // steps, 1 + 2 (N // steps), ... to the end of a table, as ComfyUI and A1111 take DDIM's.

    It is `leading` if the steps divide N; else it has more steps than asked for, such as 8 for 7 of 1000.
    """
    n = table_size(path, "ddim_uniform")
    entries = torch.arange(1, n, max(n // steps, 1), dtype=torch.float64).flip(0)
    return torch.cat([(entries + 1) / n, torch.zeros(1, dtype=torch.float64)])


def table_size(path: PathConfig, grid: str) -> int:
    """Return N. Raises ValueError, naming the grid, for a path without a table."""
    if not isinstance(path, BetaTablePath):
        raise ValueError(f"grid {grid!r} counts the entries of a table, and path {path.kind} has none: use trailing")
    return path.num_train_timesteps


def simple(path: PathConfig, steps: int) -> Tensor:
    """Every (N / steps)-th entry from the last, rounded towards the noise. ComfyUI's simple_scheduler."""
    n = path.num_train_timesteps if isinstance(path, BetaTablePath) else steps
    passed = (torch.arange(steps, dtype=torch.float64) * (n / steps)).floor()
    return torch.cat([(n - passed) / n, torch.zeros(1, dtype=torch.float64)])


def normal(path: PathConfig, steps: int) -> Tensor:
    """Even in the entries from the last to the first, and then 0. A1111's uniform, ComfyUI's normal_scheduler."""
    return _between_entries(path, torch.arange(steps, dtype=torch.float64) / max(1, steps - 1))


def sgm_uniform(path: PathConfig, steps: int) -> Tensor:
    """Like normal for one step more, without the last entry. A1111's and ComfyUI's, after Stability's own code."""
    return _between_entries(path, torch.arange(steps, dtype=torch.float64) / steps)


def _between_entries(path: PathConfig, fractions: Tensor) -> Tensor:
    """Return the times at fractions of the way from the last entry to the first, and 0.

    Between entries log(sigma / alpha) is linear, as in k-diffusion's DiscreteSchedule; next to an infinite one t is.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    if not isinstance(path, BetaTablePath):
        return torch.cat([torch.lerp(torch.ones(1, dtype=torch.float64), cleanest_time(path), fractions), zero])
    n = path.num_train_timesteps
    positions = 1 + (n - 1) * (1 - fractions)  # t = 1 / N is the first entry
    below = positions.floor()
    levels = torch.lerp(path.log_snr(below / n), path.log_snr(positions.ceil() / n), positions - below)
    between = (positions > below) & levels.isfinite()
    return torch.cat([torch.where(between, path.time_of_log_snr(levels), positions / n), zero])


def quadratic(path: PathConfig, steps: int) -> Tensor:
    """Like linear, but even in sqrt(t): more steps near the data. Song et al. 2020 (arXiv 2010.02502), appendix D.2."""
    return _to_the_cleanest(path, steps, power=2)


def _to_the_cleanest(path: PathConfig, steps: int, *, power: int) -> Tensor:
    fractions = torch.arange(steps, dtype=torch.float64) / max(1, steps - 1)
    roots = torch.lerp(torch.ones_like(fractions), cleanest_time(path) ** (1 / power), fractions)
    return torch.cat([path.snap(roots**power), torch.zeros(1, dtype=torch.float64)])


def even_log_snr(path: PathConfig, steps: int) -> Tensor:
    """Even in log-SNR, as in DPM-Solver. Lu et al. 2022 (arXiv 2206.00927), section 3.4."""
    return _in_log_snr(path, steps, lambda fraction, low, high: low + fraction * (high - low))


def karras(path: PathConfig, steps: int, rho: float = 7.0) -> Tensor:
    """Even in (sigma / alpha)^(1 / rho). Karras et al. 2022 (arXiv 2206.00364), eq. 5."""

    def place(fraction: Tensor, low: float, high: float) -> Tensor:
        first, last = math.exp(-low / 2 / rho), math.exp(-high / 2 / rho)
        return -2 * rho * (first + fraction * (last - first)).log()

    return _in_log_snr(path, steps, place)


def kl_optimal(path: PathConfig, steps: int) -> Tensor:
    """Even in arctan(sigma / alpha), and then 0. Sabour et al. 2024 (arXiv 2404.14507), eq. 7, as ComfyUI takes it.

    A1111's has one step less between the ends and stops at the last level, where noise is left.
    """

    def place(fraction: Tensor, low: float, high: float) -> Tensor:
        first, last = math.atan(math.exp(-low / 2)), math.atan(math.exp(-high / 2))
        return -2 * (first + fraction * (last - first)).tan().log()

    return _in_log_snr(path, steps, place)


def beta(path: PathConfig, steps: int, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Quantiles of a beta distribution of t: more steps at both ends. Lee et al. 2024 (arXiv 2407.12173), section 4.

    The quantiles come from the integral of the density, by the trapezoidal rule in u: t = sin^2(x) removes its infinite
    ends, and x = pi / 2 (3 u^2 - 2 u^3) their infinite slopes. They are correct to 1e-6.
    """
    u = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    x = math.pi / 2 * u**2 * (3 - 2 * u)
    density = x.sin() ** (2 * a - 1) * x.cos() ** (2 * b - 1) * u * (1 - u)  # of u
    mass = torch.nn.functional.pad(torch.cumulative_trapezoid(density), (1, 0))
    wanted = torch.arange(steps, -1, -1, dtype=torch.float64) / steps * mass[-1]
    above = torch.searchsorted(mass, wanted).clamp(1, len(mass) - 1)
    fraction = (wanted - mass[above - 1]) / (mass[above] - mass[above - 1])
    return path.snap(torch.lerp(x[above - 1], x[above], fraction).sin() ** 2)


# sigma / alpha of Stable Diffusion 1.5's best ten steps. Sabour et al. 2024 (arXiv 2404.14507), quick-start guide.
ALIGNED_SD15 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def align_your_steps(path: PathConfig, steps: int) -> Tensor:
    """The noise levels optimised for Stable Diffusion 1.5, interpolated in their logarithm."""
    known = torch.tensor(ALIGNED_SD15, dtype=torch.float64).log()
    at = torch.arange(steps, dtype=torch.float64) * ((len(known) - 1) / steps)  # the last level becomes 0
    below = at.long()
    levels = torch.lerp(known[below], known[below + 1], at - below)
    times = path.time_of_log_snr(-2 * levels)
    return torch.cat([times, torch.zeros(1, dtype=torch.float64)])


def _in_log_snr(path: PathConfig, steps: int, place: Callable[[Tensor, float, float], Tensor]) -> Tensor:
    """Return the times at place(fraction, noisy end, clean end) for fractions from 0 to 1, and then t = 0."""
    low, high = path.log_snr_range
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    before = one if path.time_of_log_snr(torch.tensor(low, dtype=torch.float64)) < 1 else one[:0]
    count = steps - len(before)
    if count < 1:
        return torch.cat([one, zero])
    fractions = torch.arange(count, dtype=torch.float64) / max(1, count - 1)
    return torch.cat([before, path.time_of_log_snr(place(fractions, low, high)), zero])


TIME_GRIDS: dict[str, Grid] = {
    "trailing": trailing,
    "linear": linear,
    "leading": leading,
    "quadratic": quadratic,
    "karras": karras,
    "exponential": even_log_snr,  # k-diffusion's name: even in log(sigma / alpha), which is the same
    "log_snr": even_log_snr,
    "beta": beta,
    "align_your_steps": align_your_steps,
    "normal": normal,
    "simple": simple,
    "sgm_uniform": sgm_uniform,
    "ddim_uniform": ddim_uniform,
    "kl_optimal": kl_optimal,
}
# A1111's "Schedule type" where it is not the grid's own name.
SCHEDULE_TYPES = {"uniform": "normal", "ddim": "ddim_uniform", "polyexponential": "exponential"}  # its rho is 1
