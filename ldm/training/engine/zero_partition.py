"""The elements of each weight that this rank owns, and their location in DeepSpeed's optimisers.

Under every ZeRO stage each element of each weight has one owner, which keeps its average and writes it to checkpoints.
Under ZeRO 1 to 3 that is the rank whose optimiser updates it. Under ZeRO 0 all ranks hold everything, and divide the
work. This file reads the attributes of DeepSpeed's optimisers that its own fragment API uses
(deepspeed.utils.tensor_fragment); a test with real processes checks that all stages give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ldm.interop.fragments import Span
from ldm.training.engine.distributed import Ranks
from ldm.training.optim.muon import Cut
from ldm.training.optim.optimizers import MuonAndAdamW, prepare_state, set_step

Read = Callable[[str, Span], Tensor]  # (group, elements of a weight) -> these elements of the group's tensor


@dataclass(frozen=True, slots=True)
class Fragment:
    """Consecutive elements of a weight."""

    span: Span
    optimizer_tensor: Tensor  # the float32 tensor that holds them, which the optimiser updates
    offset: int  # of the first element in the flattened optimizer_tensor

    def of(self, tensor: Tensor) -> Tensor:
        """Return these elements of a tensor of optimizer_tensor's shape: a view, 1-D."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.span.size)


class Partition:
    """This rank's fragments of all weights. optimizer: DeepSpeed's, or under ZeRO 0 PyTorch's."""

    def __init__(self, network: nn.Module, optimizer: Any, world: Ranks) -> None:
        self.world, self.network = world, network
        self.weights = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.shapes: dict[str, torch.Size] = {n: getattr(p, "ds_shape", p.shape) for n, p in self.weights.items()}
        self.zero = optimizer
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.owned, self.held = list(self._owned()), list(self._held())
        if isinstance(self.optimizer, MuonAndAdamW):
            self._set_layout(self.optimizer)
        for fragment in self.held:
            prepare_state(self.optimizer, fragment.optimizer_tensor)

    def _owned(self) -> Iterator[Fragment]:
        raise NotImplementedError

    def _held(self) -> Iterator[Fragment]:
        """The fragments that this rank keeps in memory, and must load on resume."""
        return self._owned()

    def _set_layout(self, optimizer: MuonAndAdamW) -> None:
        """Pass the optimiser the location of the matrices that it updates, if they are not the network's own."""

    def weights_changed(self) -> None:
        """Copy the weights written into the fragments to the network. Every rank calls it."""

    def own_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the float32 weights that this rank owns: names and 1-D views."""
        for fragment in self.owned:
            yield fragment.span.name, fragment.of(fragment.optimizer_tensor)

    def moments(self, fragment: Fragment) -> dict[str, Tensor]:
        """Return the optimiser's state of a fragment by name, without its step count: 1-D views."""
        state = self.optimizer.state[fragment.optimizer_tensor]
        return {name: fragment.of(value) for name, value in state.items() if name != "step"}

    @torch.no_grad()
    def load(self, read: Read, step: int, *, fresh: bool = False) -> None:
        """Load weights and moments as they were after `step` optimiser steps. Every rank calls it.

        fresh: the moments begin anew, as before the first step, since those of another optimiser were saved.
        """
        for fragment in self.held:
            fragment.of(fragment.optimizer_tensor).copy_(read("weights", fragment.span))
            for name, moment in self.moments(fragment).items():
                moment.zero_() if fresh else moment.copy_(read(name, fragment.span))
            set_step(self.optimizer.state[fragment.optimizer_tensor], 0 if fresh else step)
        self.weights_changed()


class Replicated(Partition):
    """ZeRO 0: every rank holds all weights, and owns an equal part of the elements of each."""

    def _held(self) -> Iterator[Fragment]:
        return (Fragment(Span(name, 0, p.numel()), p, 0) for name, p in self.weights.items())

    def _owned(self) -> Iterator[Fragment]:
        for name, p in self.weights.items():
            start, stop = (p.numel() * part // self.world.ranks for part in (self.world.rank, self.world.rank + 1))
            if start < stop:
                yield Fragment(Span(name, start, stop), p, start)


class FlatPartition(Partition):
    """Each rank's optimiser updates flat tensors that contain fragments of many weights."""

    def _optimizer_tensor(self, name: str) -> Tensor:
        """Return the flat tensor that contains this rank's fragment of a weight, if it has any."""
        raise NotImplementedError

    def _set_layout(self, optimizer: MuonAndAdamW) -> None:
        fragments = {fragment.span.name: fragment for fragment in self.owned}
        cuts: dict[Tensor, list[Cut]] = {}
        for name, p in self.weights.items():
            if p in optimizer.matrices:
                own, shape = fragments.get(name), self.shapes[name]  # own: None if this rank has no elements of it
                cut = Cut(shape, own.span.start, own.offset, own.span.size) if own else Cut(shape, 0, 0, 0)
                cuts.setdefault(self._optimizer_tensor(name), []).append(cut)
        optimizer.lay_out(cuts, lambda part, cut: self.world.gather_flat(part, cut.start, cut.shape, everywhere=True))


class Flattened(FlatPartition):
    """ZeRO 1 and 2: all weights of a group form one flat tensor, of which each rank's optimiser updates a part."""

    def _owned(self) -> Iterator[Fragment]:
        for name, p in self.weights.items():
            mapping = p._hp_mapping  # pyright: ignore[reportAttributeAccessIssue] - DeepSpeed's
            if mapping is None:
                continue
            ours, theirs = mapping.lp_fragment_address, mapping.hp_fragment_address
            span = Span(name, ours.start, ours.start + ours.numel)
            yield Fragment(span, self._optimizer_tensor(name), theirs.start)

    def _optimizer_tensor(self, name: str) -> Tensor:
        return self.zero.single_partition_of_fp32_groups[self._group_numbers[self.weights[name]]]

    @cached_property
    def _group_numbers(self) -> dict[nn.Parameter, int]:
        return {p: number for number, group in enumerate(self.zero.bit16_groups) for p in group}

    def weights_changed(self) -> None:
        self.zero.update_lp_params()


class Sharded(FlatPartition):
    """ZeRO 3: each weight is split into equal parts, one per rank; the last part is padded."""

    def _owned(self) -> Iterator[Fragment]:
        for name in self.weights:
            _, offset, size = self._position(name)
            start, numel = self.world.rank * size, self.shapes[name].numel()
            stop = min(start + size, numel)
            if start < stop:
                yield Fragment(Span(name, start, stop), self._optimizer_tensor(name), offset)

    def _optimizer_tensor(self, name: str) -> Tensor:
        return self.zero.fp32_partitioned_groups_flat[self._position(name)[0]]

    def _position(self, name: str) -> tuple[int, int, int]:
        """Return the index of the flat tensor, the first element in it, and the number of elements per rank."""
        return self.zero.grad_position[self.zero.get_param_id(self.weights[name])]

    def weights_changed(self) -> None:
        """Update the shards and the small weights, which DeepSpeed keeps unsharded on every rank, from the optimiser's
        weights, as DeepSpeed does at the end of its own step."""
        self.zero.checkpoint_event_prologue()
        for group in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero.checkpoint_event_epilogue()


def partition_of(network: nn.Module, optimizer: Any, world: Ranks, *, zero_stage: int) -> Partition:
    kind = {0: Replicated, 3: Sharded}.get(zero_stage, Flattened)
    return kind(network, optimizer, world)
