"""The noise levels of ComfyUI's and A1111's schedules, written anew from their rules, over a table of sigmas.

Sources: Comfy-Org/ComfyUI, comfy/samplers.py at a125cd8; AUTOMATIC1111/stable-diffusion-webui, modules/sd_schedulers.py
at v1.9.4 and, for what came later, lllyasviel/stable-diffusion-webui-forge at dfdcbab; crowsonkb/k-diffusion,
k_diffusion/external.py (DiscreteSchedule). `table` rises, as theirs does; each returns n levels and a zero.
"""

import math

import numpy as np


def at(table: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """t_to_sigma: linear in log sigma between entries."""
    return np.exp(np.interp(positions, np.arange(len(table)), np.log(table)))


def normal(table: np.ndarray, n: int) -> list[float]:
    """A1111's uniform, ComfyUI's normal."""
    return [*at(table, np.linspace(len(table) - 1, 0, n)), 0.0]


def sgm_uniform(table: np.ndarray, n: int) -> list[float]:
    return [*at(table, np.linspace(len(table) - 1, 0, n + 1)[:-1]), 0.0]


def simple(table: np.ndarray, n: int) -> list[float]:
    return [*(table[-(1 + int(x * (len(table) / n)))] for x in range(n)), 0.0]


def ddim_uniform(table: np.ndarray, n: int) -> list[float]:
    return [*table[1 :: max(len(table) // n, 1)][::-1], 0.0]


def kl_optimal(table: np.ndarray, n: int) -> list[float]:
    """ComfyUI's."""
    first, last = math.atan(table[-1]), math.atan(table[0])
    return [*(math.tan(x / (n - 1) * last + (1 - x / (n - 1)) * first) for x in range(n)), 0.0]


def exponential(table: np.ndarray, n: int) -> list[float]:
    return [*np.exp(np.linspace(math.log(table[-1]), math.log(table[0]), n)), 0.0]


def polyexponential(table: np.ndarray, n: int) -> list[float]:
    low, high = math.log(table[0]), math.log(table[-1])
    return [*np.exp(np.linspace(1, 0, n) ** 1.0 * (high - low) + low), 0.0]


def karras(table: np.ndarray, n: int) -> list[float]:
    low, high = table[0] ** (1 / 7), table[-1] ** (1 / 7)
    return [*((high + np.linspace(0, 1, n) * (low - high)) ** 7), 0.0]
