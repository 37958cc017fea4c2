"""Training a network under DeepSpeed ZeRO: the one file that imports deepspeed.

Networks stay plain modules. Weights are float32 and the forward pass runs under autocast, so that the optimiser,
the EMA and the checkpoints never see a rounded weight. Frozen networks stay outside: under ZeRO 3 they break.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import shutil
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.ema import EMA, PowerProfile, WarmedUp
from ldm.lr import LRConfig, lr_at


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    zero_stage: Literal[0, 1, 2, 3] = 0  # 1 shards the optimiser, 2 also gradients, 3 also weights
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # of the forward pass; auto: bf16 where the hardware has it
    clip: float = 1.0  # largest norm of the gradient; 0 leaves it as it is


@dataclass(frozen=True, kw_only=True)
class OptimConfig(LRConfig):
    """AdamW (Loshchilov & Hutter 2019) and the average of the weights."""

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    ema_decay: float = 0.999
    # Relative lengths of averages whose snapshots any other length can be reconstructed from (0.05 and 0.1 are usual).
    ema_lengths: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.ema_lengths)) < len(self.ema_lengths):
            raise ValueError(f"optim.ema_lengths names a length twice: {self.ema_lengths}")
        WarmedUp(self.ema_decay)
        for length in self.ema_lengths:
            PowerProfile(length)


@dataclass(frozen=True, slots=True)
class World:
    """This process among all that train together."""

    rank: int
    ranks: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class NonFiniteError(Exception):
    """A loss or gradient stopped being a number."""


class CheckpointError(Exception):
    """A checkpoint cannot be used for this run."""


def start_process() -> World:
    """Join the other processes (launched by deepspeed or torchrun; alone under plain python), and pick the device.

    Call it once, before any tensor work: denormals must be flushed before the threads start. Without that a freshly
    zero-initialised transformer trains its first steps seven times slower on a CPU.
    """
    torch.set_flush_denormal(True)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    # DeepSpeed compiles with ninja, which pip has put beside this python; an environment need not be activated.
    os.environ["PATH"] = str(Path(sys.executable).parent) + os.pathsep + os.environ.get("PATH", "")
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    if os.environ["RANK"] == "0":
        print("starting DeepSpeed (which compiles a helper the first time: half a minute)", flush=True)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns wherever there is no CUDA
    # DeepSpeed calls functions that PyTorch has renamed, and each rank would say so between the lines of progress.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        try:
            deepspeed.init_distributed(verbose=False)
        except dist.DistNetworkError as error:
            raise ValueError(
                f"port {os.environ['MASTER_PORT']} is taken, by another training perhaps: start this one with "
                "deepspeed --master_port N, or torchrun --standalone"
            ) from error
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return World(dist.get_rank(), dist.get_world_size(), device)


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether the forward pass runs in bfloat16. Raises ValueError if it is asked for on a GPU that has none."""
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if precision == "bf16" and device.type == "cuda" and not able:
        raise ValueError("engine.precision is bf16 but this GPU has none: use fp32")
    return precision == "bf16" or (precision == "auto" and able)


def deepspeed_config(config: EngineConfig, *, batch_size: int, ranks: int, bf16: bool) -> dict[str, Any]:
    """DeepSpeed's own settings, derived: nothing in them is written a second time elsewhere."""
    if batch_size % ranks:
        raise ValueError(f"data.batch_size ({batch_size}) is not a multiple of the {ranks} ranks: choose one that is")
    return {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // ranks,
        "zero_optimization": {"stage": config.zero_stage},
        "gradient_clipping": config.clip,
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
        "steps_per_print": 10**9,  # progress is ours to print
    }


class Engine:
    """One network, its optimiser and the float32 average of its weights, over all processes."""

    def __init__(
        self,
        network: nn.Module,
        world: World,
        *,
        config: EngineConfig,
        optim: OptimConfig,
        batch_size: int,
        total_steps: int,
    ) -> None:
        import deepspeed

        self.world, self.config, self.optim, self.total_steps = world, config, optim, total_steps
        self.step = 0  # optimiser steps taken
        self.bf16 = use_bf16(config.precision, world.device)
        network.to(world.device)
        decayed = [p for p in network.parameters() if p.ndim >= 2]
        others = [p for p in network.parameters() if p.ndim < 2]  # biases, norms: never decayed
        groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
        # Fused AdamW takes a quarter of the time of the plain one on a CPU.
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=optim.betas, fused=True)
        settings = deepspeed_config(config, batch_size=batch_size, ranks=world.ranks, bf16=self.bf16)
        # DeepSpeed puts attributes on modules and parameters that no type knows of.
        self._engine: Any = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)[0]
        # Replicated weights need one average; sharded ones are averaged where they lie.
        self.ema = EMA(self._own_weights(), WarmedUp(optim.ema_decay)) if self._holds_ema else None
        lengths = optim.ema_lengths if self._holds_ema else ()
        self.power_emas = {length: EMA(self._own_weights(), PowerProfile(length)) for length in lengths}

    def __call__(self, *inputs: Tensor) -> Any:
        """The network's forward pass, under autocast where precision says so."""
        return self._engine(*inputs)

    def update(self, loss: Tensor) -> float:
        """Backward, optimiser step and EMA; returns the loss's mean over all ranks.

        Raises NonFiniteError, naming the step, on every rank alike; a non-finite loss leaves all weights as they are.
        """
        value = self.means({"loss": loss})["loss"]
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss of step {self.step + 1} is {value}: lower optim.lr or set engine.precision=fp32"
            )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self.lr
        self._engine.backward(loss)
        self._check_gradient(self._whole_gradient_norm())
        self._engine.step()
        self._check_gradient(self._engine.get_global_grad_norm())
        self.step += 1
        for average in self._averages():
            average.update(self._own_weights())
        return value

    def _whole_gradient_norm(self) -> Tensor | None:
        """The gradient's norm before the step. DeepSpeed itself knows it from ZeRO 1 on, and only after the step."""
        if self.config.zero_stage > 0:
            return None
        return torch.nn.utils.get_total_norm([p.grad for p in self._engine.module.parameters() if p.grad is not None])

    def _check_gradient(self, norm: Tensor | float | None) -> None:
        if norm is not None and not math.isfinite(float(norm)):
            raise NonFiniteError(
                f"the gradient of step {self.step + 1} is {float(norm)}: resume from the last checkpoint"
            )

    @property
    def lr(self) -> float:
        """The learning rate of the step to come."""
        return lr_at(self.optim, self.step, self.total_steps)

    def means(self, values: Mapping[str, Tensor]) -> dict[str, float]:
        """The mean of each tensor's elements over all ranks, in one message. What is empty everywhere is left out."""
        if not values:
            return {}
        device = self.world.device  # the one that ranks talk over, wherever a measure was computed
        totals = torch.stack([value.detach().float().sum().to(device) for value in values.values()])
        counts = torch.tensor([float(value.numel()) for value in values.values()], device=device)
        together = torch.stack([totals, counts])
        if self.world.ranks > 1:
            dist.all_reduce(together)
        return {name: total / n for name, total, n in zip(values, *together.tolist(), strict=True) if n > 0}

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, as many of each, one rank's after another's."""
        if self.world.ranks == 1:
            return rows
        found = [torch.empty_like(rows) for _ in range(self.world.ranks)]
        dist.all_gather(found, rows.contiguous())
        return torch.cat(found)

    def total(self, count: int) -> int:
        """The sum of one number over all ranks."""
        share = torch.tensor(float(count), device=self.world.device)
        return round(self.means({"count": share})["count"] * self.world.ranks)

    def agree(self, wish: bool) -> bool:
        """Whether any rank wishes so; all ranks get the same answer, so that none goes on alone."""
        return self.means({"wish": torch.tensor(float(wish), device=self.world.device)})["wish"] > 0

    def averaged_weights(self, length: float | None = None) -> dict[str, Tensor]:
        """The EMA's full weights, float32, and the network's buffers as they are. Every rank must call it; where
        weights are replicated only the main rank receives them, and the others an empty dict.

        length: of one of optim.ema_lengths; None: the plain average.
        """
        average = self.ema if length is None else self.power_emas.get(length)
        if average is None:
            return {}
        module = self._engine.module
        saved = module.state_dict().keys()
        buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
        if self.config.zero_stage < 3:
            return average.shadow | buffers
        shapes = {name: parameter.ds_shape for name, parameter in module.named_parameters()}
        return {name: self._gather(shard, shapes[name]) for name, shard in average.shadow.items()} | buffers

    def save(self, folder: Path, record: dict[str, Any]) -> None:
        """Write a checkpoint that appears under its name only when whole. Every rank must call it."""
        partial = folder.with_name(folder.name + ".partial")
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        self._engine.save_checkpoint(str(partial), tag="state", save_latest=False)
        if self.ema is not None:
            powers = {length: average.state_dict() for length, average in self.power_emas.items()}
            torch.save(self.ema.state_dict() | {"powers": powers}, partial / f"ema_{self.world.rank:05d}.pt")
        dist.barrier()
        if self.world.is_main:
            state = {"step": self.step, "ranks": self.world.ranks, "zero_stage": self.config.zero_stage}
            (partial / "state.json").write_text(json.dumps(record | state, indent=1) + "\n")
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        dist.barrier()

    def record_of(self, folder: Path) -> dict[str, Any]:
        """What was saved beside the state of a checkpoint. Raises CheckpointError if it cannot be read."""
        with _readable(folder):
            return json.loads((folder / "state.json").read_text())

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises CheckpointError if it was written by another number of ranks or under another ZeRO stage, or is damaged.
        """
        record = self.record_of(folder)
        with _readable(folder):
            ranks, stage = record["ranks"], record["zero_stage"]
        if (ranks, stage) != (self.world.ranks, self.config.zero_stage):
            raise CheckpointError(
                f"{folder} was written by {ranks} ranks under ZeRO {stage}, this run has {self.world.ranks} under ZeRO "
                f"{self.config.zero_stage}: start it as then, or set run.resume=never and another run.name"
            )
        with _readable(folder):
            if self._engine.load_checkpoint(str(folder), tag="state")[0] is None:
                raise FileNotFoundError("it holds no state of DeepSpeed")
            if self.ema is not None:
                file = folder / f"ema_{self.world.rank:05d}.pt"
                state = torch.load(file, weights_only=True, map_location=self.world.device)
                self.ema.load_state_dict(state)
                for length, average in self.power_emas.items():
                    average.load_state_dict(state["powers"][length])
            self.step = record["step"]

    @property
    def _holds_ema(self) -> bool:
        return self.config.zero_stage == 3 or self.world.is_main

    def _averages(self) -> list[EMA]:
        """Those that this rank holds."""
        return [*([self.ema] if self.ema is not None else []), *self.power_emas.values()]

    def _own_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The float32 weights that this rank holds: whole ones, or under ZeRO 3 its shard of each."""
        for name, parameter in self._engine.module.named_parameters():
            yield name, parameter.ds_tensor if self.config.zero_stage == 3 else parameter

    def _gather(self, shard: Tensor, shape: torch.Size) -> Tensor:
        shards = [torch.empty_like(shard) for _ in range(self.world.ranks)]
        dist.all_gather(shards, shard)
        return torch.cat(shards)[: shape.numel()].view(shape)


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """What DeepSpeed, PyTorch and JSON raise for files that are missing or damaged, as a CheckpointError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, AssertionError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"{folder} cannot be read ({reason}): remove it, and the checkpoint before it will be taken"
        ) from error
