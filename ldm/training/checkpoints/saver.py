"""Save in the background: copy the tensors at once; a thread writes, checks and commits them."""

from __future__ import annotations

import atexit
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from enum import IntEnum
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import NonFiniteError
from ldm.files.atomic import atomic_file, to_disk
from ldm.files.checkpoints import STATE, Checkpoints, Digest, write_json
from ldm.interop.fragments import Span, rank_file, write_fragments

POLL_SECONDS = 0.02
LEAVE_SECONDS = 30.0


class Status(IntEnum):
    IDLE = 0
    WRITING = 1
    WRITTEN = 2  # on the main rank: all ranks' files are written, and the checkpoint is committed
    FAILED = 3


class Abandoned(Exception):
    """Another rank could not write its part."""


class NonFiniteStateError(NonFiniteError):
    """A tensor to be saved contains a number that is not finite."""


class Saver:
    """One rank's part in writing checkpoints.

    Every rank writes its own file; the main rank, rank 0, waits for those of the others and commits the folder. The
    ranks communicate only through the folder; the caller exchanges each rank's `status`.
    """

    def __init__(self, checkpoints: Checkpoints, *, rank: int, ranks: int) -> None:
        self.checkpoints, self.rank, self.ranks = checkpoints, rank, ranks
        self.status = Status.IDLE
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()
        self._staging = StagingBuffers({})
        self._partial = Path()
        atexit.register(self._leave)

    def prepare(self, step: int, size: int) -> None:
        """Create the folder to write to, on the main rank, before any rank begins. Raises OSError on failure.

        size: bytes that all ranks together will write; fewer free bytes are an error before the disk is full.
        """
        partial = self._partial_path(step)
        self.checkpoints.clear()  # after an abandoned save, a rank may still have written its file
        self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.checkpoints.folder).free
        if free < size:
            raise OSError(f"{partial} needs {size / 2**20:.0f} MiB, but only {free / 2**20:.0f} MiB are free")
        partial.mkdir()
        to_disk(self.checkpoints.folder.parent)

    def begin(
        self, step: int, tensors: Mapping[str, Tensor], spans: Mapping[str, Span], record: Mapping[str, Any]
    ) -> None:
        """Copy the tensors and start to write them. record: what the main rank writes next to them, as JSON."""
        assert self.status is Status.IDLE, "the last checkpoint is still being written"
        self._partial = self._partial_path(step)
        self._abandoned.clear()
        try:
            copies = self._copy(tensors, spans)
        except (RuntimeError, MemoryError) as error:  # no memory for the copies: report a failed save
            self.status, self.error = Status.FAILED, error
            return
        self.status, self.error = Status.WRITING, None
        arguments = (copies, dict(spans), json.loads(json.dumps(record)))
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def end(self, *, abandon: bool) -> None:
        """End a save once all ranks have written their parts. abandon: one has failed, so remove the folder."""
        if abandon:
            self._abandoned.set()
        if self._thread is not None:
            self._thread.join()
        if abandon and self.rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
        self.status, self._thread = Status.IDLE, None

    def _leave(self) -> None:
        """At interpreter exit, finish this rank's write; do not wait for other ranks."""
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join(LEAVE_SECONDS)

    def _partial_path(self, step: int) -> Path:
        path = self.checkpoints.path(step)
        return path.with_name(path.name + ".partial")

    def _copy(self, tensors: Mapping[str, Tensor], spans: Mapping[str, Span]) -> dict[str, Tensor]:
        """Copy the tensors. Fragments are the same views at each save and reuse their buffers; the others are small."""
        fragments = {key: tensor for key, tensor in tensors.items() if key in spans}
        if not self._staging.matches(fragments):
            self._staging = StagingBuffers({})  # free the old buffers before allocating new ones
            self._staging = StagingBuffers(fragments)
        self._staging.copy()
        others = StagingBuffers({key: tensor for key, tensor in tensors.items() if key not in spans})
        others.copy()
        return self._staging.tensors | others.tensors

    def _run(self, copies: dict[str, Tensor], spans: Mapping[str, Span], record: Mapping[str, Any]) -> None:
        try:
            digest = self._write(copies, spans)
            if self.rank == 0:
                digests = {rank_file(0): digest, STATE: write_json(self._partial / STATE, record)}
                self.checkpoints.commit(self._partial, digests | self._digests_of_others())
                self.checkpoints.prune()
            self.status = Status.WRITTEN
        except Exception as error:  # the main thread reports it: nothing catches it in this one
            self.error, self.status = error, Status.FAILED

    def _write(self, copies: dict[str, Tensor], spans: Mapping[str, Span]) -> Digest:
        """Write this rank's file. Other ranks than the main one leave its digest next to it, to be collected."""
        for key, copy in copies.items():
            if copy.is_floating_point() and not copy.isfinite().all():
                raise NonFiniteStateError(f"{key} is not finite, so nothing was saved")
        path = self._partial / rank_file(self.rank)
        write_fragments(path, copies, spans)
        to_disk(path)
        digest = Digest.of(path)
        if self.rank != 0:
            with atomic_file(path.with_suffix(".json")) as partial:
                write_json(partial, digest._asdict())
        return digest

    def _digests_of_others(self) -> dict[str, Digest]:
        digests: dict[str, Digest] = {}
        for rank in range(1, self.ranks):
            path = self._partial / rank_file(rank)
            digest_file = path.with_suffix(".json")
            while not digest_file.exists():
                if self._abandoned.is_set():
                    raise Abandoned("another rank could not write its part")
                time.sleep(POLL_SECONDS)
            digests[path.name] = Digest(**json.loads(digest_file.read_text()))
            digest_file.unlink()
        return digests


class StagingBuffers:
    """Buffers for copies of the same tensors, which a thread can write while training changes the originals.

    They are reused at each save: fresh memory is several times slower to fill. Tensors adjacent in memory, as under
    ZeRO, are copied as one: a thousand calls for small tensors would cost more than copying the bytes.
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
