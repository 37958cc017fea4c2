"""k-diffusion's samplers as its users get them, written anew from their formulas: over sigma, for denoise(x, sigma).

Source: crowsonkb/k-diffusion, k_diffusion/sampling.py at 4601bf0; Restart: AUTOMATIC1111/stable-diffusion-webui,
modules/sd_samplers_extra.py at v1.9.4. sigmas fall to 0, noise() returns the next draw.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[], Tensor]


def split(start: float, end: float, eta: float) -> tuple[float, float]:
    """get_ancestral_step."""
    up = min(end, eta * math.sqrt(end**2 * (start**2 - end**2) / start**2))
    return math.sqrt(end**2 - up**2), up


def euler(x: Tensor, x0: Tensor, start: float, end: float) -> Tensor:
    return x + (x - x0) / start * (end - start)


def euler_ancestral(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise, eta: float = 1.0) -> Tensor:
    for start, end in pairwise(sigmas):
        down, up = split(start, end, eta)
        x = euler(x, denoise(x, start), start, down)
        x = x + up * noise() if up else x
    return x


def heun(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise) -> Tensor:
    for start, end in pairwise(sigmas):
        slope = (x - denoise(x, start)) / start
        after = x + slope * (end - start)
        x = after if end == 0 else x + (slope + (after - denoise(after, end)) / end) / 2 * (end - start)
    return x


def dpmpp_2s_ancestral(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise, eta: float = 1.0) -> Tensor:
    for start, end in pairwise(sigmas):
        x0 = denoise(x, start)
        down, up = split(start, end, eta)
        if down > 0:
            middle = math.sqrt(start * down)
            x0 = denoise(middle / start * x - math.expm1(math.log(middle / start)) * x0, middle)
            x = down / start * x - math.expm1(math.log(down / start)) * x0
        else:
            x = euler(x, x0, start, 0.0)
        x = x + up * noise() if up else x
    return x


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise) -> Tensor:
    before, h_before = None, 0.0
    for start, end in pairwise(sigmas):
        x0 = carried = denoise(x, start)
        if end == 0:
            return x0
        h = math.log(start / end)
        if before is not None:
            carried = (1 + h / h_before / 2) * x0 - h / h_before / 2 * before
        x = end / start * x - math.expm1(-h) * carried
        before, h_before = x0, h
    return x


def dpm_2_ancestral(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise, eta: float = 1.0) -> Tensor:
    for start, end in pairwise(sigmas):
        x0 = denoise(x, start)
        down, up = split(start, end, eta)
        if down == 0:
            x = euler(x, x0, start, 0.0)
            continue
        middle = math.sqrt(start * down)
        half = euler(x, x0, start, middle)
        x = x + (half - denoise(half, middle)) / middle * (down - start)
        x = x + up * noise() if eta else x
    return x


def dpmpp_sde(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise, eta: float = 1.0) -> Tensor:
    for start, end in pairwise(sigmas):
        x0 = denoise(x, start)
        if end > 0:
            middle = math.sqrt(start * end)
            down, up = split(start, middle, eta)
            half = down / start * x - math.expm1(math.log(down / start)) * x0
            half = half + up * noise() if eta else half
            x0 = denoise(half, middle)
            down, up = split(start, end, eta)
            x = down / start * x - math.expm1(math.log(down / start)) * x0
            x = x + up * noise() if eta else x
        else:
            x = euler(x, x0, start, 0.0)
    return x


def dpmpp_2m_sde(
    denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise, *, solver_type: str = "midpoint"
) -> Tensor:
    before, h_before = None, 0.0
    for start, end in pairwise(sigmas):
        x0 = denoise(x, start)
        if end == 0:
            return x0
        h = math.log(start / end)
        kept = -math.expm1(-2 * h)
        x = end / start * math.exp(-h) * x + kept * x0
        if before is not None:
            weight = kept / 2 if solver_type == "midpoint" else kept / (-2 * h) + 1
            x = x + weight * h / h_before * (x0 - before)
        x = x + noise() * end * math.sqrt(kept)
        before, h_before = x0, h
    return x


def dpmpp_3m_sde(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise) -> Tensor:
    answers: list[Tensor] = []
    hs: list[float] = []
    for start, end in pairwise(sigmas):
        answers.append(denoise(x, start))
        x0 = answers[-1]
        if end == 0:
            return x0
        h = math.log(start / end)
        x = math.exp(-2 * h) * x - math.expm1(-2 * h) * x0
        phi_2 = math.expm1(-2 * h) / (2 * h) + 1
        phi_3 = phi_2 / (2 * h) - 0.5
        if len(hs) >= 2:
            r0, r1 = hs[-1] / h, hs[-2] / h
            d0, d1 = (x0 - answers[-2]) / r0, (answers[-2] - answers[-3]) / r1
            x = x + phi_2 * (d0 + (d0 - d1) * r0 / (r0 + r1)) - phi_3 * (d0 - d1) / (r0 + r1)
        elif hs:
            x = x + phi_2 * (x0 - answers[-2]) / (hs[-1] / h)
        x = x + noise() * end * math.sqrt(-math.expm1(-2 * h))
        hs.append(h)
    return x


def lms(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise) -> Tensor:
    """Order 4 also into sigma = 0."""
    slopes: list[Tensor] = []
    for i, (start, end) in enumerate(pairwise(sigmas)):
        slopes = [*slopes[-3:], (x - denoise(x, start)) / start]
        nodes = np.array(sigmas[i + 1 - len(slopes) : i + 1])
        for j, slope in enumerate(slopes):
            others = np.delete(nodes, j)
            integral = np.poly1d(others, r=True).integ() / np.prod(nodes[j] - others)
            x = x + (integral(end) - integral(start)) * slope
    return x


class Solver:
    """DPMSolver, in t = -log sigma."""

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise

    def eps(self, x: Tensor, t: float) -> Tensor:
        return (x - self.denoise(x, math.exp(-t))) * math.exp(t)

    def first(self, x: Tensor, t: float, to: float) -> Tensor:
        return x - math.exp(-to) * math.expm1(to - t) * self.eps(x, t)

    def second(self, x: Tensor, t: float, to: float, r: float = 1 / 2) -> Tensor:
        h, eps = to - t, self.eps(x, t)
        u = x - math.exp(-(t + r * h)) * math.expm1(r * h) * eps
        return x - math.exp(-to) * math.expm1(h) * (eps + (self.eps(u, t + r * h) - eps) / (2 * r))

    def third(self, x: Tensor, t: float, to: float) -> Tensor:
        h, eps = to - t, self.eps(x, t)
        s1, s2 = t + h / 3, t + 2 * h / 3
        u1 = x - math.exp(-s1) * math.expm1(h / 3) * eps
        change = self.eps(u1, s1) - eps
        u2 = x - math.exp(-s2) * (math.expm1(2 * h / 3) * eps + 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * change)
        change = self.eps(u2, s2) - eps
        return x - math.exp(-to) * (math.expm1(h) * eps + 1.5 * (math.expm1(h) / h - 1) * change)

    def lower(self, t: float, to: float, last: float, eta: float) -> tuple[float, float]:
        """The t to step to, and the noise up to `to`."""
        if not eta:
            return to, 0.0
        lower = min(last, -math.log(split(math.exp(-t), math.exp(-to), eta)[0] or 1e-300))
        return lower, math.sqrt(max(0.0, math.exp(-2 * to) - math.exp(-2 * lower)))


def dpm_fast(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise, eta: float = 1.0) -> Tensor:
    """As in A1111: n the number of sigmas above 0, from the first to the last of them."""
    solver, n = Solver(denoise), len(sigmas) - 1
    m = n // 3 + 1
    last = -math.log(sigmas[-2])
    ts = np.linspace(-math.log(sigmas[0]), last, m + 1).tolist()
    orders = [3] * (m - 2) + [2, 1] if n % 3 == 0 else [3] * (m - 1) + [n % 3]
    for order, (t, to) in zip(orders, pairwise(ts), strict=True):
        lower, up = solver.lower(t, to, last, eta)
        x = (solver.first, solver.second, solver.third)[order - 1](x, t, lower)
        x = x + up * noise() if up else x
    return x


def dpm_adaptive(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise, eta: float = 1.0) -> Tensor:
    """dpm_solver_adaptive with the arguments' defaults: order 3, rtol 0.05, atol 0.0078, h_init 0.05."""
    solver, h, before = Solver(denoise), 0.05, x
    t, last = -math.log(sigmas[0]), -math.log(sigmas[-2])
    while t < last - 1e-5:
        to = min(last, t + h)
        lower, up = solver.lower(t, to, last, eta)
        low, high = solver.second(x, t, lower, 1 / 3), solver.third(x, t, lower)
        allowed = (0.05 * np.maximum(low.abs().numpy(), before.abs().numpy())).clip(0.0078)
        error = float(np.sqrt(np.mean(np.square((low - high).numpy() / allowed))))
        factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / (1.5 if eta else 3)) - 1)
        if factor >= 0.81:
            before, x, t = low, high + up * noise() if up else high, to
        h *= factor
    return x


def karras(n: int, low: float, high: float) -> list[float]:
    """get_sigmas_karras, without the zero at its end."""
    return ((high ** (1 / 7) + np.linspace(0, 1, n) * (low ** (1 / 7) - high ** (1 / 7))) ** 7).tolist()


def restart(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise) -> Tensor:
    """restart_sampler: a list of steps, and Heun's method along them."""
    steps = len(sigmas) - 1
    pairs = list(pairwise(sigmas))
    if steps >= 20:
        again, times = (9, 1) if steps < 36 else (steps // 4, 2)
        sigmas = [*karras(steps - again * times, sigmas[-2], sigmas[0]), 0.0]
        low, high = (int(np.argmin(np.abs(np.array(sigmas) - near))) for near in (0.1, 2))
        pairs = []
        for i, pair in enumerate(pairwise(sigmas)):
            pairs.append(pair)
            if i + 1 == low and high < low:
                pairs += times * list(pairwise(karras(again + 1, sigmas[low], sigmas[high])))
    reached = sigmas[0]
    for start, end in pairs:
        if start > reached * (1 + 1e-6):
            x = x + noise() * math.sqrt(start**2 - reached**2)
        slope = (x - denoise(x, start)) / start
        after = x + slope * (end - start)
        x = after if end == 0 else x + (slope + (after - denoise(after, end)) / end) / 2 * (end - start)
        reached = end
    return x
