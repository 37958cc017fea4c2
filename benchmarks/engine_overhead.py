"""Time the engine's steps against bare DeepSpeed's on the same network, and how long a step waits for a save.

    python benchmarks/engine_overhead.py [--zero-stage 2] [--rounds 15]

Steps are timed in turns, a few of ours and a few of DeepSpeed's, in one process; ratios are medians over the rounds.
DeepSpeed keeps no average of the weights: its column with one adds a loop over parameters, as its users write it.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STEPS_A_ROUND = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zero-stage", type=int, default=0, choices=range(4))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--saves", type=int, default=10)
    args = parser.parse_args()
    from ldm.training.engine.launch import start_process

    world = start_process()
    folder = Path(tempfile.mkdtemp(prefix="overhead-"))
    ours, bare = our_step(world, args, folder), bare_step(args, average=False)
    ways: dict[str, Callable[[], Any]] = {"ours": ours[0], "DeepSpeed": bare}
    if args.zero_stage < 3:  # where weights are cut up, such a loop finds none
        ways["DeepSpeed and an average"] = bare_step(args, average=True)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(args.rounds + 1):
        for name, step in ways.items():
            began = time.perf_counter()
            for _ in range(STEPS_A_ROUND):
                step()
            if round_ > 0:  # the first warms up
                times[name].append((time.perf_counter() - began) / STEPS_A_ROUND)
    for name, found in times.items():
        print(f"{name}: {1000 * statistics.median(found):.1f} ms a step")
    for name in list(ways)[1:]:
        ratios = [mine / other for mine, other in zip(times["ours"], times[name], strict=True)]
        print(f"ours / {name}: {statistics.median(ratios):.3f}")
    saves(ours[1], ours[0], args.saves)
    shutil.rmtree(folder)


def network() -> Any:
    import torch

    from ldm.denoisers import DiTConfig

    torch.manual_seed(0)
    return DiTConfig(depth=8, width=256, heads=4, sample_size=16).build(latent_channels=4, context_width=256)


def batch(size: int) -> tuple[Any, ...]:
    import torch

    context, mask = torch.randn(size, 32, 256), torch.ones(size, 32, dtype=torch.bool)
    return torch.randn(size, 4, 16, 16), torch.rand(size), context, mask, torch.randn(size, 256)


def our_step(world: Any, args: Any, folder: Path) -> tuple[Callable[[], Any], Any]:
    from ldm.files.checkpoints import Checkpoints
    from ldm.training.engine.config import EngineConfig, OptimConfig
    from ldm.training.engine.engine import Engine

    engine = Engine(
        network(),
        world,
        config=EngineConfig(zero_stage=args.zero_stage),
        optim=OptimConfig(lr=1e-4),
        batch_size=args.batch,
        total_steps=10**6,
        checkpoints=Checkpoints(folder, keep=1),
    )
    inputs = batch(args.batch)
    return lambda: engine.update(engine(*inputs).float().square().mean() for _ in range(1)), engine


def bare_step(args: Any, *, average: bool) -> Callable[[], Any]:
    import deepspeed
    import torch

    from ldm.training.engine.config import EngineConfig, OptimConfig, deepspeed_settings, resolved_precision
    from ldm.training.optim.optimizers import build_optimizer

    config = EngineConfig(zero_stage=args.zero_stage)
    precision = resolved_precision(config.precision, torch.device("cpu"))
    settings = deepspeed_settings(config, batch_size=args.batch, ranks=1, precision=precision)
    settings["gradient_clipping"] = config.clip  # which the engine does by itself under ZeRO 0
    net = network()
    optimizer = build_optimizer(net, OptimConfig(lr=1e-4))
    engine: Any = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)[0]
    inputs = batch(args.batch)
    shadows = [p.detach().clone() for p in engine.module.parameters()] if average else []

    @torch.no_grad()
    def update() -> None:
        for shadow, p in zip(shadows, engine.module.parameters(), strict=True):
            shadow.lerp_(p, 0.001)

    def step() -> None:
        loss = engine(*inputs).float().square().mean()
        loss.item()  # whoever trains looks at the loss
        engine.backward(loss)
        engine.step()
        if average:
            update()

    return step


def saves(engine: Any, step: Callable[[], Any], count: int) -> None:
    """Time how long training waits for a save in the background, and for one in the foreground."""
    waited, whole, beside = [], [], []
    for number in range(count + 1):
        step()
        began = time.perf_counter()
        engine.save()
        background = time.perf_counter() - began
        began, steps = time.perf_counter(), 0
        saved = None
        while saved is None:
            saved = step().saved
            steps += 1
        during = (time.perf_counter() - began) / steps
        assert not saved.failed, saved
        step()
        began = time.perf_counter()
        engine.save()
        saved = engine.finish_save()
        blocking = time.perf_counter() - began
        assert saved is not None and not saved.failed, saved
        if number > 0:
            waited.append(background)
            whole.append(blocking)
            beside.append(during)
    size = sum(file.stat().st_size for file in saved.path.iterdir()) / 2**20
    share = statistics.median(a / b for a, b in zip(waited, whole, strict=True))
    print(
        f"a checkpoint of {size:.0f} MiB: training waits {1000 * statistics.median(waited):.1f} ms, "
        f"{1000 * statistics.median(whole):.0f} ms if it waits to the end: {share:.1%}; "
        f"a step while it is written: {1000 * statistics.median(beside):.0f} ms"
    )


if __name__ == "__main__":
    main()
