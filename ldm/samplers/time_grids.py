"""Time grids: the times of a path at which a sampler evaluates the denoiser.

All end at t = 0 and start at t = 1, except those made for Stable Diffusion (leading, align_your_steps). Grids in
log-SNR lie between the path's finite ends (log_snr_range); if the path starts from pure noise, t = 1 is an additional
node before them.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ldm.diffusion.paths import PathConfig
from ldm.files.messages import unknown_name

Grid = Callable[[PathConfig, int], Tensor]


def time_grid(path: PathConfig, steps: int, grid: str | Sequence[float] | None = None) -> Tensor:
    """Return steps + 1 times, float64, strictly decreasing to 0.

    grid: a name of TIME_GRIDS, or the times themselves; None: the path's default. Raises ValueError, naming the
    invalid value.
    """
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, not {steps}")
    grid = path.default_grid if grid is None else grid
    if not isinstance(grid, str):
        return explicit_times(steps, grid)
    grid = grid.lower()
    if grid not in TIME_GRIDS:
        raise unknown_name("time grid", grid, {name: name for name in TIME_GRIDS})
    times = TIME_GRIDS[grid](path, steps)
    if not (times[:-1] > times[1:]).all():
        raise ValueError(
            f"grid {grid} has no {steps} different times on path {path.kind}: use fewer steps, or trailing"
        )
    return times


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
    n: int | None = getattr(path, "num_train_timesteps", None)
    if n is None:
        raise ValueError(f"grid 'leading' counts the entries of a table, and path {path.kind} has none: use trailing")
    if steps > n - 1:
        raise ValueError(f"steps is {steps}, more than the path has noise levels; use fewer")
    entries = torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (n // steps) + 1
    return torch.cat([(entries + 1) / n, torch.zeros(1, dtype=torch.float64)])


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
}
