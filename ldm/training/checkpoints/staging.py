"""Staging buffers: copies of tensors that a thread can write while training changes the originals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import is_

import torch
from torch import Tensor


class StagingBuffers:
    """Buffers for copies of the same tensors, reused at each save: fresh memory is several times slower to fill.

    Tensors adjacent in memory, as under ZeRO, are copied as one: a thousand calls for small tensors would cost more
    than copying the bytes.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Allocate the buffers; nothing is copied yet. Raises RuntimeError if there is not enough memory."""
        self._originals = dict(tensors)
        self.tensors: dict[str, Tensor] = {}  # contiguous, in host memory
        self._sources: list[Tensor] = []
        self._targets: list[Tensor] = []
        for run in adjacent_runs(self._originals):
            sizes = [self._originals[key].numel() for key in run]
            source = self._originals[run[0]].detach()
            if len(run) > 1:
                source = source.as_strided((sum(sizes),), (1,))
            target = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
            self._sources.append(source)
            self._targets.append(target)
            for key, part in zip(run, target.view(-1).split(sizes), strict=True):
                self.tensors[key] = part.view(self._originals[key].shape)

    def matches(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether these are the same tensor objects that the buffers were made for."""
        same = tensors.keys() == self._originals.keys()
        return same and all(map(is_, tensors.values(), map(self._originals.__getitem__, tensors)))

    def copy(self) -> None:
        """Copy the current values of the tensors."""
        if self._sources:
            foreach_copy = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage]
            foreach_copy(self._targets, self._sources, non_blocking=True)
        if any(source.is_cuda for source in self._sources):
            torch.cuda.synchronize()


def adjacent_runs(tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Group the keys into runs of tensors, each of which begins in memory where the one before ends."""
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
    contiguous = all(tensor.is_contiguous() and tensor.numel() > 0 for tensor in (first, second))
    return bool(alike and contiguous and first.storage_offset() + first.numel() == second.storage_offset())
