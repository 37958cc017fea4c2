"""Save in the background: copy the tensors at once; a thread writes, checks and commits them."""

from __future__ import annotations

import atexit
import json
import shutil
import threading
import time
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.errors import NonFiniteError
from ldm.files.atomic import atomic_file, to_disk
from ldm.training.checkpoints.folders import Checkpoints
from ldm.training.checkpoints.fragments import Span, rank_file, write_fragments
from ldm.training.checkpoints.manifest import Digest, write_json
from ldm.training.checkpoints.staging import StagingBuffers

STATE = "state.json"
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
        if abandon:
            if self.rank == 0:
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
