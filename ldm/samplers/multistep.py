"""Multistep samplers: reuse the denoiser's outputs at earlier nodes, for high order with one evaluation per step.

A step from alpha = 0 is infinite in lambda, so it is a DDIM step, and its output is not reused; a step to sigma = 0 is
a DDIM step as well.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ldm.diffusion.nodes import Step, grid_steps
from ldm.diffusion.paths import PathConfig
from ldm.samplers.steps import Denoise, Generators, add_noise, ddim_step


def dpmpp_2m(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """DPM-Solver++(2M): a DDIM step with x0 extrapolated from its last change. Lu et al. 2022 (arXiv 2211.01095),
    algorithm 2."""
    return carried_on(denoise, x, path, times, lambda x, x0, step: ddim_step(x, x0, *step))


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """SDE-DPM-Solver++(2M): dpmpp_2m with fresh noise at each step. Lu et al. 2022, algorithm 4."""
    return carried_on(denoise, x, path, times, lambda x, x0, step: sde_step(x, x0, step, generator))


def dpmpp_2m_sde_heun(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """dpmpp_2m_sde with the line through the last two x0 integrated exactly, where that takes it in the middle.

    k-diffusion's sample_dpmpp_2m_sde with solver_type "heun".
    """

    def weight(h: float) -> float:
        return 1 / -math.expm1(-2 * h) - 1 / (2 * h)  # phi_2 / phi_1 of 2 h: see third_order_sde

    return carried_on(denoise, x, path, times, lambda x, x0, step: sde_step(x, x0, step, generator), weight)


def carried_on(
    denoise: Denoise,
    x: Tensor,
    path: PathConfig,
    times: Tensor,
    advance: Callable[[Tensor, Tensor, Step], Tensor],
    weight: Callable[[float], float] = lambda h: 0.5,
) -> Tensor:
    """Step by x' = advance(x, D, step), D = x0_i + w h_i / h_{i-1} (x0_i - x0_{i-1}), h the step in lambda, w = 1/2."""
    previous: tuple[Tensor, float] | None = None
    for step in grid_steps(path, times):
        x0 = denoise(x, step.start.t)
        carried = x0
        if previous is not None and math.isfinite(step.h):
            x0_previous, h_previous = previous
            carried = x0 + weight(step.h) * step.h / h_previous * (x0 - x0_previous)
        x = advance(x, carried, step)
        previous = (x0, step.h) if math.isfinite(step.h) else None
    return x


def sde_step(x: Tensor, x0: Tensor, step: Step, generator: Generators) -> Tensor:
    """x' = (sigma' / sigma) e^-h x + alpha' (1 - e^-2h) x0 + sigma' sqrt(1 - e^-2h) n: the reverse SDE, x0 constant.

    Lu et al. 2022, eq. 18; it is DDPM's posterior. Higher orders replace x0 by more terms.
    """
    kept = -math.expm1(-2 * step.h)
    x = step.end.sigma / step.start.sigma * math.exp(-step.h) * x + step.end.alpha * kept * x0
    return add_noise(x, step.end.sigma * math.sqrt(kept), generator)


def dpmpp_3m_sde(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """SDE-DPM-Solver++(3M) as k-diffusion, the origin of the name, has it: with half of the parabola's last term."""
    return third_order_sde(denoise, x, path, times, generator, bends=1)


def dpmpp_3m_sde_exact(denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators) -> Tensor:
    """dpmpp_3m_sde with all of the last term, so that a parabola is integrated exactly."""
    return third_order_sde(denoise, x, path, times, generator, bends=2)


def third_order_sde(
    denoise: Denoise, x: Tensor, path: PathConfig, times: Tensor, generator: Generators, *, bends: float
) -> Tensor:
    """Take x0 along a parabola through its last three values.

    Over u = lambda - lambda_i the step needs the integral of 2 e^(-2 (h - u)) x0(u): its terms in 1, u and u^2 / 2 have
    the weights phi_1, phi_2, phi_3 of 2 h, in the notation of Lu et al. 2022. bends: how often half of the second
    derivative is counted, rightly 2.
    """
    history: list[tuple[float, Tensor]] = []  # (lambda, x0), the newest last
    for step in grid_steps(path, times):
        x0 = denoise(x, step.start.t)
        if math.isfinite(step.start.half_log_snr):
            history = [*history[-2:], (step.start.half_log_snr, x0)]
        carried = x0
        if len(history) > 1 and math.isfinite(step.h):
            slope, bend = derivatives(history)
            h = 2 * step.h
            phi_2 = math.expm1(-h) / h + 1
            phi_3 = phi_2 / h - 0.5
            # Divided by phi_1 = 1 - e^-2h, by which sde_step multiplies.
            carried = x0 + (phi_2 * step.h * slope - bends * phi_3 * step.h**2 * bend) / -math.expm1(-h)
        x = sde_step(x, carried, step, generator)
    return x


def derivatives(history: Sequence[tuple[float, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the first derivative and half the second, at the newest of two or three points, of their polynomial."""
    (l0, d0), (l1, d1) = history[-1], history[-2]
    first = (d0 - d1) / (l0 - l1)
    if len(history) < 3:
        return first, torch.zeros_like(first)
    l2, d2 = history[-3]
    bend = (first - (d1 - d2) / (l1 - l2)) / (l0 - l2)
    return first + bend * (l0 - l1), bend


# ---------------------------------------------------------------------------------------------------- UniPC


def unipc(
    denoise: Denoise,
    x: Tensor,
    path: PathConfig,
    times: Tensor,
    generator: Generators,
    *,
    order: int,
    lower_at_end: bool = False,
    linear: bool = False,
) -> Tensor:
    """UniPC, order 2 or 3: predict x' from the last `order` outputs, evaluate the denoiser there, and repeat the step
    with that output.

    The next step starts from the corrected x', which is not evaluated again. Outputs are x0, with B(h) = e^-h - 1
    ("bh2"), or -h if `linear` ("bh1"). lower_at_end: reduce the order to the number of steps that are left, as "lower
    order final" does in A1111 and diffusers. Zhao et al. 2023 (arXiv 2302.04867), section 3 and algorithm 1.
    """
    history: list[tuple[float, Tensor]] = []  # (lambda, x0), the newest last
    # The last step, where it started and the outputs that it used, if it can be corrected.
    before: tuple[Step, Tensor, Sequence[tuple[float, Tensor]]] | None = None
    for left, step in zip(range(len(times) - 1, 0, -1), grid_steps(path, times), strict=True):
        x0 = denoise(x, step.start.t)
        if before is not None:
            last, origin, used = before
            x = unified_step(origin, last, used, correction=x0, linear=linear)
        if math.isfinite(step.start.half_log_snr):
            history = [*history[1 - order :], (step.start.half_log_snr, x0)]
        if math.isfinite(step.h):
            used = history[-left:] if lower_at_end else history
            before = step, x, used
            x = unified_step(x, step, used, correction=None, linear=linear)
        else:
            before = None
            x = ddim_step(x, x0, *step)
    return x


def unified_step(
    x: Tensor,
    step: Step,
    history: Sequence[tuple[float, Tensor]],
    *,
    correction: Tensor | None,
    linear: bool = False,
) -> Tensor:
    """x' = DDIM(x, D_0) - alpha' B(h) sum_m a_m (D_m - D_0) / r_m, r_m = (lambda_m - lambda_0) / h.

    D_0 is the newest output of history; D_m are the earlier ones and, if given, the output at the step's end (r = 1).
    The a_m make the step exact for polynomials. Zhao et al. 2023, eqs. 3, 8 and 9.
    """
    newest, x0 = history[-1]
    answers = [(lam, answer) for lam, answer in history[:-1]]
    if correction is not None:
        answers.append((step.end.half_log_snr, correction))
    result = ddim_step(x, x0, *step)
    if not answers:
        return result
    ratios = [(lam - newest) / step.h for lam, _ in answers]
    size = -step.h if linear else math.expm1(-step.h)
    for weight, ratio, (_, answer) in zip(unipc_weights(ratios, step.h, size), ratios, answers, strict=True):
        result = result - step.end.alpha * size * weight / ratio * (answer - x0)
    return result


def unipc_weights(ratios: Sequence[float], h: float, size: float) -> list[float]:
    """Solve sum_m a_m r_m^(i-1) = i! n phi_{i+1}(n) / B, i = 1, 2, ..., n = -h, for a; phi_k, B: Zhao et al. 2023.

    A single term has a = 1/2 instead, which is of the same order: their section 3.3, and the usual implementation. Only
    there does size, which is B(h), make a difference.
    """
    if len(ratios) == 1:
        return [0.5]
    n = -h
    b: list[float] = []
    phi = math.expm1(n) / n  # phi_1(-h)
    for i in range(1, len(ratios) + 1):
        phi = (phi - 1 / math.factorial(i)) / n  # phi_{i+1}
        b.append(phi * n * math.factorial(i) / size)
    r = torch.tensor([[ratio**i for ratio in ratios] for i in range(len(ratios))], dtype=torch.float64)
    return cast(Any, torch.linalg).solve(r, torch.tensor(b, dtype=torch.float64)).tolist()
