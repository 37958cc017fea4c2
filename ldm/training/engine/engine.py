"""Train a network under DeepSpeed ZeRO.

Networks stay plain modules. Weights are float32 and the forward pass runs under autocast, so that the optimiser,
the EMA and the checkpoints never see a rounded weight. Frozen networks stay outside: under ZeRO 3 they break.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm.errors import NonFiniteError
from ldm.files.checkpoints import Checkpoints
from ldm.training.checkpoints.train_state import RunFacts, Saved, StateCheckpointer, TrainState, versions
from ldm.training.engine.config import EngineConfig, OptimConfig, deepspeed_settings, resolved_precision
from ldm.training.engine.distributed import Ranks
from ldm.training.engine.zero_partition import partition_of
from ldm.training.optim.averages import EMA, PowerProfile, WarmedUp
from ldm.training.optim.lr_schedule import lr_at
from ldm.training.optim.optimizers import ParameterGroup, build_optimizer

SKIPPED_AT_MOST = 10  # batches in a row without a finite gradient before training stops
START, LARGEST = 2.0**16, 2.0**24  # of the loss scale
PATIENCE = 2000  # steps without overflow before the loss scale is doubled


class Update(NamedTuple):
    """The result of one call of Engine.update, the same on every rank."""

    loss: float  # the mean over the global batch
    fault: str | None  # None: a step was taken; otherwise what was not finite, and the weights are unchanged
    bad_ranks: list[int]  # those whose own loss was not finite
    wished: list[bool]  # for each wish, whether any rank had it
    saved: Saved | None  # the outcome of a checkpoint that was completed, or failed, since the last update


class Engine:
    """One network, its optimiser and the float32 averages of its weights, distributed over all ranks."""

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
        groups: Sequence[ParameterGroup] | None = None,
        exported: Callable[[str], bool] = lambda name: True,
    ) -> None:
        """groups: of all trained parameters; None: one group. exported: whether to average a tensor, by its name."""
        self.world, self.config, self.optim, self.total_steps = world, config, optim, total_steps
        self._exported = exported
        self.step = 0  # optimiser steps taken
        self.position = 0  # global batches used: steps plus skipped batches
        self.skipped_in_a_row = 0
        self.resumed = False  # whether a checkpoint was loaded
        self.precision = resolved_precision(config.precision, world.device)
        self.loss_scale = LossScale() if self.precision == "fp16" else None
        settings = deepspeed_settings(config, batch_size=batch_size, ranks=world.ranks, precision=self.precision)
        self._engine = self._initialize(network, settings, groups)
        self._partition = partition_of(self._engine.module, self._engine.optimizer, world, zero_stage=config.zero_stage)
        # By group name in a checkpoint. Each rank averages the weights that it owns: training gathers nothing.
        profiles = {"ema": WarmedUp(optim.ema_decay)} | {f"ema_{n:g}": PowerProfile(n) for n in optim.ema_lengths}
        self.averages = {group: EMA(self._averaged(), profile) for group, profile in profiles.items()}
        self._checkpointer = StateCheckpointer(self._partition, self.averages, checkpoints)

    def _initialize(self, network: nn.Module, settings: dict[str, Any], groups: Sequence[ParameterGroup] | None) -> Any:
        """Build DeepSpeed's engine. It adds attributes to modules and parameters that type checkers do not know."""
        import deepspeed

        network.to(self.world.device)
        if self.config.recompute:
            recompute_blocks(network, reentrant=self.config.zero_stage == 3)
        if self.config.compile:
            network.compile()
        optimizer = build_optimizer(network, self.optim, groups)
        engine: Any = deepspeed.initialize(model=network, optimizer=optimizer, config=settings)[0]
        if self.loss_scale is not None:
            # DeepSpeed's scaler may halve the scale on only some of the ranks, or never; ours is the same on all ranks.
            engine.torch_autocast_z0_gradscaler = None
            if self.config.zero_stage > 0:
                engine.optimizer.torch_autocast_gradscaler = None
        return engine

    def __call__(self, *inputs: Any) -> Any:
        """Run the network's forward pass, under autocast unless precision is fp32."""
        return self._engine(*inputs)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return lr_at(self.optim, self.step, self.total_steps)

    def update(self, losses: Iterable[Tensor], wishes: Sequence[bool] = ()) -> Update:
        """Take one optimiser step on one global batch: backward passes with gradient accumulation, optimiser and EMA.

        losses: this rank's mean loss over each of config.accumulation equal parts of its batch; each is requested after
        the backward pass of the previous one. wishes: flags of this rank, combined over all ranks in the loss's
        all-reduce.

        If a loss or the gradient is not finite on any rank, every rank skips the batch: weights, moments, averages,
        `step` and learning rate stay as they are; only `position` advances. Raises NonFiniteError, on every rank, after
        SKIPPED_AT_MOST such batches in a row.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = self.lr * group["lr_scale"]
        total, bad_ranks, sums = 0.0, [], []
        for number, loss in enumerate(losses, 1):
            mine = loss.item()
            bad = [float(rank == self.world.rank and not math.isfinite(mine)) for rank in range(self.world.ranks)]
            sums = self.world.all_reduce([mine, *map(float, wishes), *self._checkpointer.report(), *bad])
            total += sums[0] / self.world.ranks / self.config.accumulation
            bad_ranks = [rank for rank, count in enumerate(sums[-self.world.ranks :]) if count]
            if bad_ranks:
                self._discard(loss)
                break
            self._backward(loss, last=number == self.config.accumulation)
        fault = f"the loss is {total:g}" if bad_ranks else self._take_step()
        self.position += 1
        self._count(fault)
        reported = len(wishes) + 1
        saved = self._checkpointer.settle(sums[reported : reported + 2])
        return Update(total, fault, bad_ranks, [count > 0 for count in sums[1:reported]], saved)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        self._engine.set_gradient_accumulation_boundary(last)
        if self.loss_scale is not None:
            if self.config.zero_stage > 0:
                self._engine.optimizer.override_loss_scale(self.loss_scale.scale)
            else:
                loss = loss * self.loss_scale.scale
        self._engine.backward(loss)

    def _discard(self, loss: Tensor) -> None:
        """Discard the gradients accumulated from this batch's earlier parts. ZeRO keeps them in its own buffers, which
        it clears when they are not finite."""
        if self.config.zero_stage == 0:
            self._engine.zero_grad()
        else:
            self._backward(loss * math.nan, last=True)
            self._engine.step()

    def _take_step(self) -> str | None:
        """Take the optimiser step and return None; or, if the gradient is not finite, skip it and return the fault."""
        if self.config.zero_stage == 0:
            norm = self._clip_gradient()
            if not math.isfinite(norm):
                self._engine.zero_grad()  # DeepSpeed itself checks it only from ZeRO 1 on
                return f"the gradient's norm is {norm}"
            self._engine.step()
            return None
        self._engine.step()
        return "the gradient is not finite" if self._engine.optimizer.overflow else None

    def _clip_gradient(self) -> float:
        """Undo the loss scale, and clip the gradient. Returns its norm before clipping."""
        trained = [p for p in self._engine.module.parameters() if p.grad is not None]
        gradients = [p.grad for p in trained]
        if self.loss_scale is not None:
            torch._foreach_mul_(gradients, 1 / self.loss_scale.scale)  # pyright: ignore[reportPrivateImportUsage]
        norm = torch.nn.utils.get_total_norm(gradients)
        length = norm.item()
        if 0 < self.config.clip < length:  # multiplying by 1 would cost as much as the norm itself
            torch.nn.utils.clip_grads_with_norm_(trained, self.config.clip, norm)
        return length

    def _count(self, fault: str | None) -> None:
        if self.loss_scale is not None:
            self.loss_scale = self.loss_scale.after(overflowed=fault is not None)
        if fault is None:
            self.step, self.skipped_in_a_row = self.step + 1, 0
            for average in self.averages.values():
                average.update(self._averaged())
            return
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= SKIPPED_AT_MOST:
            raise NonFiniteError(
                f"{fault} at step {self.step + 1}, as in each of the last {SKIPPED_AT_MOST} batches: resume from the "
                "last checkpoint with a lower optim.lr and run.allow=[optim.lr], or with engine.precision=fp32 and "
                "run.allow=[engine.precision]"
            )

    def _averaged(self) -> Iterator[tuple[str, Tensor]]:
        """The float32 weights that this rank averages."""
        return ((name, weight) for name, weight in self._partition.own_weights() if self._exported(name))

    def averaged_weights(self, length: float | None = None, *, everywhere: bool = False) -> dict[str, Tensor]:
        """Gather an average's full weights, float32, and the network's buffers, on the main rank (if everywhere: on all
        ranks). The other ranks get an empty dict. Every rank must call it.

        length: one of optim.ema_lengths; None: the average of optim.ema_decay.
        """
        average = self.averages["ema" if length is None else f"ema_{length:g}"]
        starts = {fragment.span.name: fragment.span.start for fragment in self._partition.owned}
        found: dict[str, Tensor] = {}
        here = everywhere or self.world.is_main
        for name, shape in self._partition.shapes.items():
            if not self._exported(name):
                continue
            full = self.world.gather_flat(average.shadow.get(name), starts.get(name, 0), shape, everywhere=everywhere)
            if here:
                found[name] = full.cpu()  # so that the device holds only one at a time
        buffers = {name: own for name, own in self._checkpointer.buffers().items() if self._exported(name)}
        return found | buffers if here else {}

    def save(self, facts: RunFacts = RunFacts()) -> Saved | None:  # noqa: B008 - it is immutable
        """Write a checkpoint of this step, in the background if config.save_in_background.

        Every rank must call it. Returns the outcome, or None while it is being written: then a later update returns
        the outcome.
        """
        state = TrainState(
            **facts._asdict(),
            step=self.step,
            position=self.position,
            skipped_in_a_row=self.skipped_in_a_row,
            zero_stage=self.config.zero_stage,
            precision=self.precision,
            ranks=self.world.ranks,
            versions=versions(),
            loss_scale=None if self.loss_scale is None else self.loss_scale._asdict(),
        )
        saved = self._checkpointer.begin(state)
        return saved if saved is not None or self.config.save_in_background else self.finish_save()

    def finish_save(self) -> Saved | None:
        """Wait for the checkpoint that is being written, if any. Every rank must call it."""
        return self._checkpointer.finish()

    def load(self, folder: Path, *, fresh: bool = False) -> TrainState:
        """Resume from a checkpoint, which may have been written with another world size and ZeRO stage.

        fresh: the optimiser is another, whose moments begin anew.
        Raises CheckpointError if it is damaged, or of another network.
        """
        state = self._checkpointer.load(folder, fresh=fresh)
        self.step, self.position, self.resumed = state.step, state.position, True
        self.skipped_in_a_row = state.skipped_in_a_row
        if self.loss_scale is not None and state.loss_scale is not None:
            self.loss_scale = LossScale(**state.loss_scale)
        return state


class LossScale(NamedTuple):
    """The current loss scale of float16, whose small gradients would underflow. Immutable: each step returns the next.

    Micikevicius et al. 2017 (arXiv 1710.03740).
    """

    scale: float = START
    good_steps: int = 0  # since the last change

    def after(self, *, overflowed: bool) -> LossScale:
        """Halve the scale after a gradient that is not finite, double it after PATIENCE finite ones."""
        if overflowed:
            return LossScale(max(self.scale / 2, 1.0), 0)
        if self.good_steps + 1 >= PATIENCE:
            return LossScale(min(self.scale * 2, LARGEST), 0)
        return LossScale(self.scale, self.good_steps + 1)


def recompute_blocks(network: nn.Module, *, reentrant: bool) -> list[nn.Module]:
    """Recompute the activations of a network's blocks, the entries of its module lists, in the backward pass.

    Activation checkpointing (Chen et al. 2016, arXiv 1604.06174): they are not kept in memory. Only the innermost lists
    count, so that blocks are not nested. A single layer in a list (attention has one, for the name of its output) is
    not a block. reentrant: use PyTorch's older implementation, which does not compare tensor shapes: ZeRO 3 empties
    weights between the two passes. Returns the blocks. Raises ValueError if there are none.
    """
    entries = [entry for own in network.modules() if isinstance(own, nn.ModuleList) for entry in own]
    candidates = {e: None for e in entries if not isinstance(e, nn.ModuleList) and any(True for _ in e.children())}
    blocks = [block for block in candidates if not any(m in candidates for m in block.modules() if m is not block)]
    if not blocks:
        raise ValueError(f"engine.recompute: {type(network).__name__} has no list of blocks to recompute: leave it out")
    for block in blocks:
        block.forward = partial(_recomputed, block.forward, reentrant)
    return blocks


def _recomputed(forward: Callable[..., Any], reentrant: bool, *inputs: Any, **named: Any) -> Any:
    if not reentrant:
        return checkpoint(forward, *inputs, use_reentrant=False, **named)
    if not any(isinstance(x, Tensor) and x.requires_grad for x in (*inputs, *named.values())):
        return forward(*inputs, **named)  # the reentrant version would give such a block's weights no gradient

    def positional(*values: Any) -> Any:  # the reentrant version tracks gradients only through positional arguments
        return forward(*values[: len(inputs)], **dict(zip(named, values[len(inputs) :], strict=True)))

    return checkpoint(positional, *inputs, *named.values(), use_reentrant=True)
