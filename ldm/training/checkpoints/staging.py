"""Copies of tensors, for a thread to write while the tensors move on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import is_

import torch
from torch import Tensor


class Copies:
    """Of the same tensors, taken again and again into the same memory: fresh memory is several times slower to fill.

    Tensors that lie side by side in memory, as ZeRO has them, are copied as one: a call for each of a thousand small
    ones would cost more than the bytes.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises RuntimeError if there is no memory for them. Nothing is copied yet."""
        self._originals = dict(tensors)
        self.tensors: dict[str, Tensor] = {}  # contiguous, in this machine's memory
        self._sources: list[Tensor] = []
        self._targets: list[Tensor] = []
        for run in side_by_side(self._originals):
            sizes = [self._originals[key].numel() for key in run]
            source = self._originals[run[0]].detach()
            if len(run) > 1:
                source = source.as_strided((sum(sizes),), (1,))
            target = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._sources.append(source)
            self._targets.append(target)
            for key, part in zip(run, target.view(-1).split(sizes), strict=True):
                self.tensors[key] = part.view(self._originals[key].shape)

    def are_of(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether these are the very tensors that are copied here."""
        same = tensors.keys() == self._originals.keys()
        return same and all(map(is_, tensors.values(), map(self._originals.__getitem__, tensors)))

    def take(self) -> None:
        """Copy what the tensors hold now."""
        if self._sources:
            copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            copy(self._targets, self._sources, non_blocking=True)
        if any(source.is_cuda for source in self._sources):
            torch.cuda.synchronize()


def side_by_side(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """The keys in runs of tensors each of which begins where the one before ends, in the same memory."""
    place = {key: (tensor.untyped_storage().data_ptr(), tensor.data_ptr()) for key, tensor in tensors.items()}
    run: list[str] = []
    for key in sorted(tensors, key=place.__getitem__):
        last = run[-1] if run else None
        if last is not None and not _follows(tensors[last], tensors[key]):
            yield run
            run = []
        run.append(key)
    if run:
        yield run


def _follows(first: Tensor, second: Tensor) -> bool:
    alike = first.dtype == second.dtype and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    whole = all(tensor.is_contiguous() and tensor.numel() > 0 for tensor in (first, second))
    return bool(alike and whole and first.storage_offset() + first.numel() == second.storage_offset())
