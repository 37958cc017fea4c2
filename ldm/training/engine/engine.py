"""Training a network under DeepSpeed ZeRO: the one file that imports deepspeed.

Networks stay plain modules. Weights are float32 and the forward pass runs under autocast, so that the optimiser,
the EMA and the checkpoints never see a rounded weight. Frozen networks stay outside: under ZeRO 3 they break.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ldm.errors import NonFiniteError
from ldm.training.checkpoints import Checkpoints
from ldm.training.checkpoints.train_state import Resumption, Saved
from ldm.training.engine.activation_checkpointing import recompute_blocks
from ldm.training.engine.config import EngineConfig, OptimConfig, deepspeed_settings, resolved_precision
from ldm.training.engine.distributed import Ranks
from ldm.training.engine.zero_partition import partition_of
from ldm.training.optim.ema import EMA, WarmedUp
from ldm.training.optim.loss_scale import LossScale
from ldm.training.optim.lr_schedule import lr_at
from ldm.training.optim.optimizers import build_optimizer
from ldm.training.optim.power_profile import PowerProfile

SKIPPED_AT_MOST = 10  # steps in a row without a finite gradient, before a run is stopped


class Update(NamedTuple):
    """What one call of Engine.update did, the same on every rank."""

    loss: float  # the mean over the global batch
    fault: str | None  # None: a step was taken. Otherwise what was not finite; nothing has moved
    bad_ranks: list[int]  # those whose own loss was not finite
    wished: list[bool]  # for each wish, whether any rank had it
    saved: Saved | None  # a checkpoint that has been written, or could not be, since the last update


def start_process() -> Ranks:
    """Join the other processes (launched by deepspeed or torchrun; alone under plain python), and pick the device.

    Call it once, before any tensor work: denormals must be flushed before the threads start. Without that a freshly
    zero-initialised transformer trains its first steps seven times slower on a CPU. Raises ValueError if pickles are
    let in from outside: checkpoints hold none.
    """
    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        raise ValueError("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, which lets files run code: unset it")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
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
    # DeepSpeed would set up shared memory for drawing on CPUs, 66 MB a rank, which stays when a process is killed.
    os.environ.pop("LOCAL_SIZE", None)
    if os.environ["RANK"] == "0":
        print("starting DeepSpeed (which compiles a helper the first time: half a minute)", flush=True)
    _join()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def _join() -> None:
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns wherever there is no CUDA
    # DeepSpeed calls functions that PyTorch has renamed, and each rank would say so between the lines of progress.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        try:
            if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
                _meet_again()
            deepspeed.init_distributed(verbose=False)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise  # a rank that others were to meet here is no more
            raise ValueError(
                f"port {os.environ['MASTER_PORT']} is taken, by another training perhaps: start this one with "
                "deepspeed --master_port N, or torchrun --standalone"
            ) from error
    # From here on faults.watchdog says what takes too long: one rank may draw for minutes, for which others wait.
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # before PyTorch 2.14
    set_timeout(timedelta(days=7), dist.group.WORLD)


def _meet_again() -> None:
    """Under torchrun, which starts processes again while its store lives on: there PyTorch would find the addresses of
    those that have died."""
    environment = os.environ
    hosts = environment["RANK"] == "0" and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), is_master=hosts)
    dist.init_process_group(
        "nccl" if torch.cuda.is_available() else "gloo",
        store=dist.PrefixStore(f"attempt_{environment['TORCHELASTIC_RESTART_COUNT']}", store),
        rank=int(environment["RANK"]),
        world_size=int(environment["WORLD_SIZE"]),
    )


class Engine:
    """One network, its optimiser and the float32 averages of its weights, over all processes."""

    def __init__(
        self,
        network: nn.Module,
        world: Ranks,
        *,
        config: EngineConfig,
        optim: OptimConfig,
        batch_size: int,
        total_steps: int,
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.world, self.config, self.optim, self.total_steps = world, config, optim, total_steps
        self.step = 0  # optimiser steps taken
        self.position = 0  # global batches used: one more than steps for each that was skipped
        self.skipped_in_a_row = 0
        self.resumed = False  # whether a checkpoint was loaded
        self.precision = resolved_precision(config.precision, world.device)
        self.loss_scale = LossScale() if self.precision == "fp16" else None
        settings = deepspeed_settings(config, batch_size=batch_size, ranks=world.ranks, precision=self.precision)
        self._engine = self._initialize(network, settings)
        self._partition = partition_of(self._engine.module, self._engine.optimizer, world, zero_stage=config.zero_stage)
        # Each rank averages what it owns: nothing is gathered while training.
        self.ema = EMA(self._partition.own_weights(), WarmedUp(optim.ema_decay))
        self.power_emas = {
            length: EMA(self._partition.own_weights(), PowerProfile(length)) for length in optim.ema_lengths
        }
        self._resumption = Resumption(world, self._partition, self._averages(), checkpoints, self._engine.module)

    def _initialize(self, network: nn.Module, settings: dict[str, Any]) -> Any:
        """DeepSpeed's engine, which puts attributes on modules and parameters that no type knows of."""
        import deepspeed

        network.to(self.world.device)
        if self.config.recompute:
            recompute_blocks(network, reentrant=self.config.zero_stage == 3)
        if self.config.compile:
            network.compile()
        optimizer = build_optimizer(network, self.optim)
        engine: Any = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)[0]
        if self.loss_scale is not None:
            # Its own scaler halves the scale on one rank and not on another, or never: ours is the same on all.
            engine.torch_autocast_z0_gradscaler = None
            if self.config.zero_stage > 0:
                engine.optimizer.torch_autocast_gradscaler = None
        return engine

    def __call__(self, *inputs: Any) -> Any:
        """The network's forward pass, under autocast where precision says so."""
        return self._engine(*inputs)

    @property
    def bf16(self) -> bool:
        return self.precision == "bf16"

    @property
    def lr(self) -> float:
        """The learning rate of the step to come."""
        return lr_at(self.optim, self.step, self.total_steps)

    def update(self, losses: Iterable[Tensor], wishes: Sequence[bool] = ()) -> Update:
        """One optimiser step on one global batch: backward, optimiser and EMA.

        losses: this rank's mean loss over each of config.accumulation equal parts of its share; each is asked for when
        the one before has gone backward. wishes: what any rank may want all to know; it travels with the loss.

        If a loss or the gradient is not finite on any rank, all ranks know it, and weights, moments, averages, `step`
        and learning rate stay as they are; only `position` moves on. Raises NonFiniteError, on every rank alike, after
        SKIPPED_AT_MOST such batches in a row.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self.lr
        total, bad_ranks, told = 0.0, [], []
        for number, loss in enumerate(losses, 1):
            mine = loss.item()
            bad = [float(rank == self.world.rank and not math.isfinite(mine)) for rank in range(self.world.ranks)]
            told = self.world.all_reduce([mine, *map(float, wishes), *self._resumption.report(), *bad])
            total += told[0] / self.world.ranks / self.config.accumulation
            bad_ranks = [rank for rank, count in enumerate(told[-self.world.ranks :]) if count]
            if bad_ranks:
                self._discard(loss)
                break
            self._backward(loss, last=number == self.config.accumulation)
        fault = f"the loss is {total:g}" if bad_ranks else self._take_step()
        self.position += 1
        self._count(fault)
        reported = len(wishes) + 1
        saved = self._resumption.settle(told[reported : reported + 2])
        return Update(total, fault, bad_ranks, [count > 0 for count in told[1:reported]], saved)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        if self.loss_scale is not None:
            if self.config.zero_stage > 0:
                self._engine.optimizer.override_loss_scale(self.loss_scale.scale)
            else:
                loss = loss * self.loss_scale.scale
        self._engine.backward(loss)

    def _discard(self, loss: Tensor) -> None:
        """Throw away what this batch's earlier parts have left. ZeRO keeps gradients in places of its own, and clears
        them by itself when they are not finite."""
        if self.config.zero_stage == 0:
            self._engine.zero_grad()
        else:
            self._backward(loss * math.nan, last=True)
            self._engine.step()

    def _take_step(self) -> str | None:
        """What is wrong with the gradient; None: nothing, and the optimiser has used it."""
        if self.config.zero_stage == 0:
            norm = self._clip_whole_gradient()
            if not math.isfinite(norm):
                self._engine.zero_grad()  # DeepSpeed itself looks at it only from ZeRO 1 on
                return f"the gradient's norm is {norm}"
            self._engine.step()
            return None
        self._engine.step()
        return "the gradient is not finite" if self._engine.optimizer.overflow else None

    def _clip_whole_gradient(self) -> float:
        """Undo the loss scale, and clip; returns the norm before that."""
        trained = [p for p in self._engine.module.parameters() if p.grad is not None]
        gradients = [p.grad for p in trained]
        if self.loss_scale is not None:
            torch._foreach_mul_(gradients, 1 / self.loss_scale.scale)  # pyright: ignore[reportPrivateImportUsage]
        norm = torch.nn.utils.get_total_norm(gradients)
        length = norm.item()
        if 0 < self.config.clip < length:  # to multiply by 1 would cost as much as the norm itself
            torch.nn.utils.clip_grads_with_norm_(trained, self.config.clip, norm)
        return length

    def _count(self, fault: str | None) -> None:
        if self.loss_scale is not None:
            self.loss_scale = self.loss_scale.after(overflowed=fault is not None)
        if fault is None:
            self.step, self.skipped_in_a_row = self.step + 1, 0
            for average in self._averages().values():
                average.update(self._partition.own_weights())
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= SKIPPED_AT_MOST:
            raise NonFiniteError(
                f"{fault} at step {self.step + 1}, as in each of the last {SKIPPED_AT_MOST} batches: resume from the "
                "last checkpoint with a lower optim.lr, or with engine.precision=fp32"
            )

    def _averages(self) -> dict[str, EMA]:
        """By the name of their tensors in a checkpoint."""
        return {"ema": self.ema} | {f"ema_{length:g}": average for length, average in self.power_emas.items()}

    def averaged_weights(self, length: float | None = None) -> dict[str, Tensor]:
        """An average's full weights, float32, and the network's buffers as they are, on the main rank; an empty dict
        on the others. Every rank must call it.

        length: of one of optim.ema_lengths; None: the plain average.
        """
        average = self.ema if length is None else self.power_emas[length]
        starts = {piece.span.name: piece.span.start for piece in self._partition.owned}
        found: dict[str, Tensor] = {}
        for name, shape in self._partition.shapes.items():
            whole = self.world.gather_flat(average.shadow.get(name), starts.get(name, 0), shape)
            if self.world.is_main:
                found[name] = whole.cpu()  # one at a time on the device
        return found | self._resumption.kept_whole() if self.world.is_main else {}

    def save(self, record: dict[str, Any]) -> Saved | None:
        """Write a checkpoint of this step, beside the training if config.save_in_background. Every rank must call it.

        Returns what became of it, or None while it is being written: then a later update tells.
        """
        counters = {"step": self.step, "position": self.position, "skipped_in_a_row": self.skipped_in_a_row}
        scale = {"loss_scale": self.loss_scale.record()} if self.loss_scale is not None else {}
        how = {"zero_stage": self.config.zero_stage, "precision": self.precision}
        saved = self._resumption.begin(self.step, record | counters | scale | how)
        return saved if saved is not None or self.config.save_in_background else self.finish_save()

    def finish_save(self) -> Saved | None:
        """Wait for the checkpoint that is being written, if one is. Every rank must call it."""
        return self._resumption.finish()

    def load(self, folder: Path) -> dict[str, Any]:
        """Continue from a checkpoint, of whichever number of ranks and ZeRO stage; returns its record.

        Raises CheckpointError if it is damaged, or another network's.
        """
        record = self._resumption.load(folder)
        self.step, self.position, self.resumed = record["step"], record["position"], True
        self.skipped_in_a_row = record["skipped_in_a_row"]
        if self.loss_scale is not None and "loss_scale" in record:
            self.loss_scale = LossScale(**record["loss_scale"])
        return record
