"""What the engine's tests run in processes of their own, on real DeepSpeed: a tiny network, trained as ordered.

    python engine_worker.py '{"out": PATH, "runs": {NAME: {"stage": 2, "steps": 10, ...}}}'

The batch at a position depends on nothing but the position, so that any number of ranks sees the same.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ldm.training.engine.engine
from ldm.files.checkpoints import Checkpoints
from ldm.interop.fragments import Fragments
from ldm.training.checkpoints.train_state import CheckpointError, RunFacts
from ldm.training.engine.config import EngineConfig, OptimConfig, deepspeed_settings
from ldm.training.engine.distributed import Ranks
from ldm.training.engine.engine import Engine, NonFiniteError
from ldm.training.engine.launch import start_process

BATCH, INPUTS, OUTPUTS = 8, 7, 5


def network(hidden: int) -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.ModuleList([nn.Sequential(nn.Linear(INPUTS, hidden), nn.GELU())])
    return Chain(blocks, nn.Linear(hidden, OUTPUTS))


class Chain(nn.Module):
    """A list of blocks, a head, a single number, as CLIP has one, and a buffer."""

    shift: Tensor

    def __init__(self, blocks: nn.ModuleList, head: nn.Module) -> None:
        super().__init__()
        self.blocks, self.head = blocks, head
        self.scale = nn.Parameter(torch.ones(1))  # DeepSpeed shares no tensor without a dimension
        self.register_buffer("shift", torch.zeros(OUTPUTS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        x = self.head(x)
        return x * self.scale.to(x.dtype) + self.shift.to(x.dtype)


def batch_at(position: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, INPUTS, generator=torch.Generator().manual_seed(1000 + position))
    return x, x[:, :OUTPUTS].clone()


def losses(engine: Engine, spoiled: dict[int, str]) -> Iterator[Tensor]:
    """Of this rank's parts. spoiled: what is wrong with the last sample of the batch at a position."""
    kind = spoiled.get(engine.position)
    x, y = batch_at(engine.position)
    if kind == "input":
        x[-1, 0] = float("nan")
    world, parts = engine.world, engine.config.accumulation
    for part in torch.arange(BATCH).chunk(world.ranks)[world.rank].chunk(parts):
        loss = (engine(x[part]).float() - y[part]).square().mean()
        if kind == "gradient" and part[-1] == BATCH - 1:
            loss = loss + (0 * loss).sqrt()  # sqrt has no derivative at 0, and 0 times infinity is no number
        if kind == "overflow":
            loss = loss * 1e6
        yield loss


def run(world: Ranks, order: dict[str, Any]) -> dict[str, Any]:
    engine_config = {"precision": "fp32"} | order.get("engine", {})
    optim = {"lr": 0.01, "ema_decay": 0.9, "weight_decay": 0.01, "ema_lengths": (0.1,)} | order.get("optim", {})
    folder = Path(order["save"]) if "save" in order else None
    engine = Engine(
        network(order.get("hidden", 33)),
        world,
        config=EngineConfig(zero_stage=order["stage"], **engine_config),
        optim=OptimConfig(**optim),
        batch_size=BATCH,
        total_steps=100,
        checkpoints=Checkpoints(folder, keep=2) if folder is not None else None,
    )
    found: dict[str, Any] = {"losses": [], "faults": [], "bad_ranks": [], "lr": [], "scales": []}
    if "load" in order:
        engine.load(Path(order["load"]))
    spoiled = {int(position): kind for position, kind in order.get("spoiled", {}).items()}
    while engine.position < order["batches"]:
        found["lr"].append(engine.lr)
        update = engine.update(losses(engine, spoiled), wishes=[world.rank == 0, world.rank == 1, False])
        found["losses"].append(update.loss)
        found["wished"] = update.wished
        found["scales"].append(engine.loss_scale.scale if engine.loss_scale is not None else None)
        if update.fault is not None:
            found["faults"].append(update.fault)
            found["bad_ranks"].append(update.bad_ranks)
    return found | outcome(engine, folder)


def outcome(engine: Engine, folder: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {"step": engine.step, "position": engine.position}
    if folder is not None:
        saved = engine.save(RunFacts(samples_seen=BATCH * engine.position)) or engine.finish_save()
        assert saved is not None and not saved.failed, saved
        with Fragments(saved.path) as fragments:
            found["digest"] = fragments.digest()
            found["generators"] = sorted(key for key in fragments.keys() if key.startswith("generators/"))
    averages = {"ema": engine.averaged_weights(), "power": engine.averaged_weights(0.1)}
    for name, weights in averages.items():
        found[name] = {key: tensor.double().flatten().tolist()[:4000] for key, tensor in weights.items()}
    found["shapes"] = {key: list(tensor.shape) for key, tensor in averages["ema"].items()}
    found["held"] = sum(
        shadow.numel() for shadow in engine.averages["ema"].shadow.values()
    )  # of the average, by this rank
    found["compiled"] = engine._engine.module._compiled_call_impl is not None
    output = engine(torch.zeros(2, INPUTS))
    found["dtypes"] = [str(output.dtype), str({shadow.dtype for shadow in engine.averages["ema"].shadow.values()})]
    return found


def in_order(world: Ranks, own: list[int]) -> list[list[float]]:
    """Rows of this rank, perhaps none, among those of all ranks."""
    order = torch.tensor(own, dtype=torch.int64)
    return world.gather_in_order(order, torch.stack([order, -order], dim=1).float() if own else None).tolist()


def told(world: Ranks) -> dict[str, Any]:
    uneven = torch.arange(3.0)[: 1 + 2 * world.rank]  # [0] on rank 0, [0, 1, 2] on rank 1
    return {
        "means": world.mean({"rank": torch.tensor(float(world.rank)), "uneven": uneven, "none": torch.empty(0)}),
        "gathered": world.gather(torch.tensor([[world.rank, 1.0]], dtype=torch.float64)).tolist(),
        "agreed": [world.any_rank(world.rank == wishing) for wishing in range(2)],
        "total": world.all_reduce([world.rank + 2])[0],
        "uneven_in_order": in_order(world, [[2, 0], [1]][world.rank]),
        "the_last_ranks": in_order(world, [2, 0] if world.rank == world.ranks - 1 else []),
    }


def main() -> None:
    order = json.loads(sys.argv[-1])  # the launcher puts --local_rank before it
    # ZeRO 3 keeps tensors below a threshold whole on every rank: then it is not ZeRO 3 that is tested.
    ldm.training.engine.engine.deepspeed_settings = sharded_settings
    world = start_process()
    found: dict[str, Any] = {"world": told(world)}
    for name, wanted in order["runs"].items():
        try:
            found[name] = run(world, wanted)
        except (NonFiniteError, CheckpointError) as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    if world.is_main:
        Path(order["out"]).write_text(json.dumps(found))


def sharded_settings(*args: Any, **named: Any) -> dict[str, Any]:
    settings = deepspeed_settings(*args, **named)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


if __name__ == "__main__":
    main()
