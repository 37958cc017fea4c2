"""Measure the fraction of a step that is a sampler's own: all but the network, for the shipped model at batch 1.

    python benchmarks/sampler_overhead.py [--ckpt weights/emoji64] [--steps 30]

Each sampler draws one picture's latents twice, in turns: with the model, guided, and with a stand-in that returns at
once. The second over the first is the sampler's fraction; the largest is printed last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ldm import DrawOptions, TextToImage
from ldm.inference.guiding import guided
from ldm.samplers import SAMPLERS, Denoise, time_grid

ROOT = Path(__file__).parents[1]


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def answers_at_once(x: Tensor, t: Tensor) -> Tensor:
    return x


def share_of_a_step(pipe: TextToImage, name: str, *, steps: int, rounds: int) -> tuple[float, float]:
    """Measure the milliseconds of a guided step, and the fraction of it that is not the network's."""
    model, side = pipe.model, pipe.parts.sample_size
    texts = model.conditioner(["a noto emoji of red apple"]), model.conditioner([""])
    network = guided(*(model.denoise_with(pipe.denoiser, text) for text in texts), 5.0, DrawOptions())
    times = time_grid(model.path, steps)

    def draw(denoise: Denoise) -> None:
        generators = [torch.Generator().manual_seed(0)]
        with torch.no_grad():
            x = model.prior(model.noise(generators, size=(side, side)), times)
            function = SAMPLERS[name].with_options(variance=lambda: torch.zeros_like(x))
            function(denoise, x, model.path, times, generators)

    draw(network), draw(answers_at_once)
    pairs = [(seconds(lambda: draw(network)), seconds(lambda: draw(answers_at_once))) for _ in range(rounds)]
    whole, alone = (statistics.median(column) for column in zip(*pairs, strict=True))
    return 1000 * whole / steps, alone / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, default=ROOT / "weights" / "emoji64")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    pipe = TextToImage.load(args.ckpt, device="cpu", dtype="fp32")
    shares: dict[str, float] = {}
    for name in SAMPLERS:
        step, shares[name] = share_of_a_step(pipe, name, steps=args.steps, rounds=args.rounds)
        print(f"{name:20} {step:6.1f} ms a step  {shares[name]:.2%} of it the sampler's own", flush=True)
    worst = max(shares, key=shares.__getitem__)
    print(json.dumps({"worst": worst, "share": round(shares[worst], 4), "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
