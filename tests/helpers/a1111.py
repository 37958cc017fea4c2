"""What A1111's web interface reads from the text of a picture, and how it draws from it: its rules, written anew.

Sources: AUTOMATIC1111/stable-diffusion-webui, tags v1.9.4 and v1.10: modules/infotext_utils.py
(parse_generation_parameters), sd_samplers.py (get_sampler_and_scheduler), sd_schedulers.py, sd_samplers_kdiffusion.py
(options, get_sigmas, sample), extra_networks.py and extensions-builtin/Lora (tags, hashes); k-diffusion's external.py
and sampling.py.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
SIZE = re.compile(r"(\d+)x(\d+)")
NEGATIVE = "Negative prompt:"
# What is assumed where the text says nothing.
ASSUMED = {"RNG": "GPU", "Schedule type": "Automatic", "Clip skip": "1"}

# Samplers of version 1.9.4, and the schedule that each takes by default.
SAMPLERS = {
    "DPM++ 2M": "Karras", "DPM++ SDE": "Karras", "DPM++ 2M SDE": "Exponential", "DPM++ 2M SDE Heun": "Exponential",
    "DPM++ 2S a": "Karras", "DPM++ 3M SDE": "Exponential", "Euler a": "", "Euler": "", "LMS": "", "Heun": "",
    "DPM2": "Karras", "DPM2 a": "Karras", "DPM fast": "", "DPM adaptive": "", "Restart": "Karras", "DDIM": "",
    "PLMS": "", "UniPC": "", "LCM": "",
}  # fmt: skip
TIMESTEP_SAMPLERS = ("DDIM", "PLMS", "UniPC")  # of CompVis's kind: their grid and start do not depend on the text
DISCARD_PENULTIMATE = ("DPM2", "DPM2 a", "DPM++ 3M SDE")  # whose grid has another step, and leaves out the last but one
# Names under which a schedule is found: its label, its own name, and aliases.
SCHEDULES_1_9 = {
    "Automatic": ("automatic",), "Uniform": ("uniform",), "Karras": ("karras",), "Exponential": ("exponential",),
    "Polyexponential": ("polyexponential",), "SGM Uniform": ("sgm_uniform", "SGMUniform"),
}  # fmt: skip
SCHEDULES_1_10 = SCHEDULES_1_9 | {
    "KL Optimal": ("kl_optimal",), "Align Your Steps": ("align_your_steps",), "Simple": ("simple",),
    "Normal": ("normal",), "DDIM": ("ddim",), "Beta": ("beta",),
}  # fmt: skip


def parse_generation_parameters(text: str) -> dict[str, str]:
    """Every value by its name, among them "Prompt" and "Negative prompt"; values like 512x512 in two halves."""
    *lines, last = text.strip().split("\n")
    if len(PAIR.findall(last)) < 3:  # no line of values
        lines, last = [*lines, last], ""
    found: dict[str, list[str]] = {"Prompt": [], "Negative prompt": []}
    into = "Prompt"
    for line in (line.strip() for line in lines):
        if line.startswith(NEGATIVE):
            into, line = "Negative prompt", line[len(NEGATIVE) :].strip()
        found[into].append(line)
    # The first lines of a prompt that are empty leave no line break.
    values: dict[str, str] = {}
    for key, value in PAIR.findall(last):
        if not value:
            continue  # it reports an error, and goes on
        value = _unquoted(value)
        if size := SIZE.fullmatch(value):
            values |= {f"{key}-1": size[1], f"{key}-2": size[2]}
        else:
            values[key] = value
    prompts = {key: "\n".join(lines).lstrip("\n") for key, lines in found.items()}
    return ASSUMED | values | prompts


def _unquoted(value: str) -> str:
    if value[0] == value[-1] == '"':
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def sampler_and_schedule(values: dict[str, str], schedules: dict[str, tuple[str, ...]]) -> tuple[str, str]:
    """The sampler and the schedule that the interface sets: unknown ones become DPM++ 2M and Automatic, and the end of
    a sampler's name may be a schedule."""
    labels = {name: label for label, names in schedules.items() for name in (label, names[0])}
    schedule = labels.get(values["Schedule type"], "Automatic")
    sampler = values.get("Sampler", "DPM++ 2M")
    for label, names in schedules.items():
        for name in (label, *names):
            if sampler.endswith(f" {name}"):
                sampler, schedule = sampler.removesuffix(f" {name}"), label
                break
    sampler = sampler if sampler in SAMPLERS else "DPM++ 2M"
    return sampler, "Automatic" if SAMPLERS[sampler] == schedule else schedule


def loras(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """The prompt without its tags, and the name and strength of each LoRA."""
    found: list[tuple[str, float]] = []

    def taken(tag: re.Match[str]) -> str:
        name, *rest = tag[2].split(":")
        if tag[1] == "lora":
            found.append((name, float(rest[0]) if rest else 1.0))
        return ""

    return re.sub(r"<(\w+):([^>]+)>", taken, prompt), found


def lora_hashes(values: dict[str, str]) -> dict[str, str]:
    """The hash of each LoRA by its name in the prompt."""
    pairs = [pair.strip().split(":", 1) for pair in values.get("Lora hashes", "").split(",") if pair]
    return {name.strip(): digest.strip() for name, digest in pairs}


class Levels:
    """sigma / alpha of Stable Diffusion's timesteps, and between them: k-diffusion's DiscreteSchedule."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().double()
        self.low, self.high = float(self.sigmas[0]), float(self.sigmas[-1])

    def at(self, timesteps: Tensor) -> Tensor:
        below = timesteps.floor().long().clamp(0, len(self.sigmas) - 1)
        above = timesteps.ceil().long().clamp(0, len(self.sigmas) - 1)
        return torch.lerp(self.sigmas.log()[below], self.sigmas.log()[above], timesteps - below).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The inverse of `at`."""
        logs = self.sigmas.log()
        above = torch.searchsorted(logs, sigma.log()).clamp(1, len(logs) - 1)
        return above - 1 + (sigma.log() - logs[above - 1]) / (logs[above] - logs[above - 1])


def _linspace(start: float, stop: float, n: int) -> Tensor:
    return torch.linspace(start, stop, n, dtype=torch.float64)


def _karras(levels: Levels, n: int, rho: float = 7.0) -> Tensor:
    ends = levels.high ** (1 / rho), levels.low ** (1 / rho)
    return _linspace(*ends, n) ** rho


def _align_your_steps(levels: Levels, n: int) -> Tensor:
    known = torch.tensor([14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]).double().log()
    at = _linspace(0, len(known) - 1, n)
    below = at.floor().long().clamp(max=len(known) - 2)
    return torch.lerp(known[below], known[below + 1], at - below).exp()


def _beta(levels: Levels, n: int) -> Tensor:
    """Quantiles of the beta distribution with both parameters 0.6: of sigma, not of the time."""
    x = _linspace(0, math.pi / 2, 100_001)  # sin^2 x is distributed so, if x has the density (sin x cos x)^0.2
    mass = torch.nn.functional.pad(torch.cumulative_trapezoid((x.sin() * x.cos()).clamp(min=0) ** 0.2), (1, 0))
    at = torch.searchsorted(mass, _linspace(1, 0, n) * mass[-1]).clamp(max=len(x) - 1)
    return levels.low + x[at].sin() ** 2 * (levels.high - levels.low)


def _kl_optimal(levels: Levels, n: int) -> Tensor:
    return _linspace(math.atan(levels.high), math.atan(levels.low), n + 1)[:-1].tan()


_LAST = 999
SIGMAS: dict[str, Callable[[Levels, int], Tensor]] = {  # without the 0 at the end
    "Uniform": lambda levels, n: levels.at(_linspace(_LAST, 0, n)),
    "Karras": _karras,
    "Exponential": lambda levels, n: _linspace(math.log(levels.high), math.log(levels.low), n).exp(),
    "SGM Uniform": lambda levels, n: levels.at(_linspace(_LAST, 0, n + 1)[:-1]),
    "Align Your Steps": _align_your_steps,
    "Simple": lambda levels, n: levels.sigmas[[-(1 + int(i * (_LAST + 1) / n)) for i in range(n)]],
    "Normal": lambda levels, n: levels.at(_linspace(_LAST, 0, n)),
    "DDIM": lambda levels, n: levels.sigmas[list(range(1, _LAST + 1, max((_LAST + 1) // n, 1)))].flip(0),
    "Beta": _beta,
    "KL Optimal": _kl_optimal,
}
SIGMAS["Polyexponential"] = SIGMAS["Exponential"]  # with its default, rho 1
SIGMAS["Automatic"] = SIGMAS["Uniform"]  # of a sampler without a default


def sigmas_of(sampler: str, schedule: str, levels: Levels, steps: int) -> Tensor:
    """The noise levels of a drawing, from the noisiest to 0."""
    more = sampler in DISCARD_PENULTIMATE
    name = SAMPLERS[sampler] or "Automatic" if schedule == "Automatic" else schedule
    sigmas = SIGMAS[name](levels, steps + more)
    return torch.cat([sigmas[:-1] if more else sigmas, torch.zeros(1, dtype=torch.float64)])


def draw(denoise: Callable[[Tensor, Tensor], Tensor], text: str, levels: Levels, shape: tuple[int, ...]) -> Tensor:
    """Draw latents as a text asks for, with Euler or Euler a. denoise(x, sigma): x = x0 + sigma n, and the x0 of it."""
    values = parse_generation_parameters(text)
    sampler, schedule = sampler_and_schedule(values, SCHEDULES_1_10)
    assert sampler in ("Euler", "Euler a") and values["RNG"] == "CPU", "nothing else is implemented here"
    eta = float(values.get("Eta", 1.0)) if sampler == "Euler a" else 0.0
    generator = torch.Generator().manual_seed(int(values["Seed"]))
    sigmas = sigmas_of(sampler, schedule, levels, int(values["Steps"]))
    first = (1 + sigmas[0] ** 2).sqrt() if values.get("SGM noise multiplier") == "True" else sigmas[0]
    x = torch.randn(shape, generator=generator) * first
    for sigma, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        x0 = denoise(x, sigma)
        up = min(then, eta * (then**2 * (sigma**2 - then**2) / sigma**2) ** 0.5)
        down = (then**2 - up**2) ** 0.5
        x = x + (x - x0) / sigma * (down - sigma)
        if up > 0:
            x = x + torch.randn(shape, generator=generator) * up
    return x
