"""Measure which fraction of this machine's matrix-product rate training reaches, in the model's own FLOPs.

    python benchmarks/training_throughput.py --config configs/emoji64_dit.yaml

Measures a bfloat16 product of 2048 x 2048 matrices, then the denoiser's training step (forward, backward, AdamW) on
random latents and captions, and prints images/s, the FLOPs an image costs in training (three times the forward pass)
and the ratio of the two rates. Both are measured in the same process, alternating, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from ldm.config import load_config
from ldm.interop.diffusers_layout.vae import load_vae
from ldm.training.denoiser_config import TrainConfig
from text import load_text_encoder

SIZE = 2048  # of the matrices


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/emoji64_dit.yaml")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    print(json.dumps(measure(load_config(TrainConfig, args.config), rounds=args.rounds)))


def measure(config: TrainConfig, *, rounds: int) -> dict[str, float]:
    vae = load_vae(Path(config.model.vae) / "vae").config
    text = load_text_encoder(Path(config.model.text) / "text_encoder").config
    denoiser = config.model.denoiser.build(latent_channels=vae.latent_channels, context_width=text.width)
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-4, fused=True)
    batch, side = config.data.batch_size, config.data.image_size // vae.factor
    x = torch.randn(batch, vae.latent_channels, side, side)
    context = torch.randn(batch, text.context_length, text.width)
    mask = torch.ones(batch, text.context_length, dtype=torch.bool)
    inputs = (x, 1000 * torch.rand(batch), context, mask, context[:, 0])
    a, b = torch.randn(2, SIZE, SIZE).bfloat16()

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (denoiser(*inputs) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def product() -> None:
        for _ in range(10):
            a @ b

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser(*inputs)
    flops = 3 * counter.get_total_flops() / batch
    step(), product()
    steps, products = zip(*[(seconds(step), seconds(product)) for _ in range(rounds)], strict=True)
    rate = flops * batch / statistics.median(steps)
    matrix_rate = 10 * 2 * SIZE**3 / statistics.median(products)
    return {
        "images_per_second": round(batch / statistics.median(steps), 1),
        "gflop_per_image": round(flops / 1e9, 2),
        "training_gflops": round(rate / 1e9, 1),
        "matrix_product_gflops": round(matrix_rate / 1e9, 1),
        "share": round(rate / matrix_rate, 3),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
