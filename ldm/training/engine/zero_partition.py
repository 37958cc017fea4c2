"""Which elements of which weights this rank owns, and where they lie in DeepSpeed's optimisers.

Under every ZeRO stage each element of each weight has one owner, which keeps its average and writes it into
checkpoints. Under ZeRO 1 to 3 that is the rank whose optimiser moves it. Under ZeRO 0 all ranks hold everything, and
share out the work. What is read here of DeepSpeed's optimisers are attributes that its own fragment API is made of
(deepspeed.utils.tensor_fragment); a test with real processes holds each stage to the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ldm.training.checkpoints import Span
from ldm.training.engine.distributed import Ranks
from ldm.training.optim.muon import Cut
from ldm.training.optim.optimizers import MuonAndAdamW, prepare_state, set_step

Read = Callable[[str, Span], Tensor]  # (group, elements of a weight) -> these elements of the group's tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of a weight's elements."""

    span: Span
    home: Tensor  # the float32 tensor that the optimiser moves, which holds them
    offset: int  # of the first of them in the flattened home

    def of(self, tensor: Tensor) -> Tensor:
        """These elements of a tensor like home: a view, 1-D."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.span.size)


class Partition:
    """This rank's pieces of all weights. optimizer: DeepSpeed's, or under ZeRO 0 PyTorch's."""

    def __init__(self, network: nn.Module, optimizer: Any, world: Ranks) -> None:
        self.world = world
        self.weights = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.shapes: dict[str, torch.Size] = {n: getattr(p, "ds_shape", p.shape) for n, p in self.weights.items()}
        self.zero = optimizer
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self.owned, self.held = self._owned(), self._held()
        if isinstance(self.optimizer, MuonAndAdamW):
            self._lay_out(self.optimizer)
        for piece in self.held:
            prepare_state(self.optimizer, piece.home)

    def _owned(self) -> list[Piece]:
        raise NotImplementedError

    def _held(self) -> list[Piece]:
        """What this rank keeps in memory, and must be given when it resumes."""
        return self._owned()

    def _lay_out(self, optimizer: MuonAndAdamW) -> None:
        """Tell it where the matrices are that it moves, if not where the network has them."""

    def weights_changed(self) -> None:
        """Give the network the weights that were written into the pieces. Every rank calls it."""

    def own_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The float32 weights that this rank owns, 1-D views by name."""
        for piece in self.owned:
            yield piece.span.name, piece.of(piece.home)

    def moments(self, piece: Piece) -> dict[str, Tensor]:
        """What the optimiser remembers of a piece, by its names for it, without its count of steps: 1-D views."""
        state = self.optimizer.state[piece.home]
        return {name: piece.of(value) for name, value in state.items() if name != "step"}

    @torch.no_grad()
    def load(self, read: Read, step: int) -> None:
        """Take over weights and moments as they were after `step` optimiser steps. Every rank calls it."""
        for piece in self.held:
            piece.of(piece.home).copy_(read("weights", piece.span))
            for name, moment in self.moments(piece).items():
                moment.copy_(read(name, piece.span))
            set_step(self.optimizer.state[piece.home], step)
        self.weights_changed()


class Replicated(Partition):
    """ZeRO 0: every rank holds all weights; each owns as many elements of each."""

    def _held(self) -> list[Piece]:
        return [Piece(Span(name, 0, p.numel()), p, 0) for name, p in self.weights.items()]

    def _owned(self) -> list[Piece]:
        found = []
        for name, p in self.weights.items():
            start, stop = (p.numel() * share // self.world.ranks for share in (self.world.rank, self.world.rank + 1))
            if start < stop:
                found.append(Piece(Span(name, start, stop), p, start))
        return found


class CutUp(Partition):
    """Each rank's optimiser moves flat tensors, made of its parts of many weights."""

    def _home(self, name: str) -> Tensor:
        """The one that a weight's part lies in, if this rank has any."""
        raise NotImplementedError

    def _lay_out(self, optimizer: MuonAndAdamW) -> None:
        pieces = {piece.span.name: piece for piece in self.owned}
        cuts: dict[Tensor, list[Cut]] = {}
        for name, p in self.weights.items():
            if p in optimizer.matrices:
                piece, shape = pieces.get(name), self.shapes[name]
                cut = Cut(shape, piece.span.start, piece.offset, piece.span.size) if piece else Cut(shape, 0, 0, 0)
                cuts.setdefault(self._home(name), []).append(cut)
        optimizer.lay_out(cuts, lambda part, cut: self.world.gather_flat(part, cut.start, cut.shape, everywhere=True))


class Flattened(CutUp):
    """ZeRO 1 and 2: all weights of a group are one flat tensor, of which each rank's optimiser moves a part."""

    def _owned(self) -> list[Piece]:
        found = []
        for name, p in self.weights.items():
            mapping = p._hp_mapping  # pyright: ignore[reportAttributeAccessIssue] - DeepSpeed's
            if mapping is None:
                continue
            ours, theirs = mapping.lp_fragment_address, mapping.hp_fragment_address
            found.append(Piece(Span(name, ours.start, ours.start + ours.numel), self._home(name), theirs.start))
        return found

    def _home(self, name: str) -> Tensor:
        return self.zero.single_partition_of_fp32_groups[self._group_numbers[self.weights[name]]]

    @cached_property
    def _group_numbers(self) -> dict[nn.Parameter, int]:
        return {p: number for number, group in enumerate(self.zero.bit16_groups) for p in group}

    def weights_changed(self) -> None:
        self.zero.update_lp_params()


class Sharded(CutUp):
    """ZeRO 3: each weight is cut into as many equal parts as there are ranks, the last one padded."""

    def _owned(self) -> list[Piece]:
        found = []
        for name in self.weights:
            _, offset, size = self._position(name)
            start, numel = self.world.rank * size, self.shapes[name].numel()
            stop = min(start + size, numel)
            if start < stop:
                found.append(Piece(Span(name, start, stop), self._home(name), offset))
        return found

    def _home(self, name: str) -> Tensor:
        return self.zero.fp32_partitioned_groups_flat[self._position(name)[0]]

    def _position(self, name: str) -> tuple[int, int, int]:
        """Number of the flat tensor, first element there, elements of a rank's part."""
        return self.zero.grad_position[self.zero.get_param_id(self.weights[name])]

    def weights_changed(self) -> None:
        """As at the end of DeepSpeed's own step: from the optimiser's weights to the shards, and to small weights,
        which it keeps whole on every rank."""
        self.zero.checkpoint_event_prologue()
        for group in range(len(self.zero.fp32_partitioned_groups_flat)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        self.zero.checkpoint_event_epilogue()


def partition_of(network: nn.Module, optimizer: Any, world: Ranks, *, zero_stage: int) -> Partition:
    match zero_stage:
        case 0:
            return Replicated(network, optimizer, world)
        case 3:
            return Sharded(network, optimizer, world)
        case _:
            return Flattened(network, optimizer, world)
