"""Saving while training goes on: tensors are copied at once, and written, checked and named by a thread."""

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
from ldm.training.checkpoints.staging import Copies

STATE = "state.json"
POLL_SECONDS = 0.02
LEAVE_SECONDS = 30.0


class Status(IntEnum):
    IDLE = 0
    WRITING = 1
    WRITTEN = 2  # on the main rank: every rank's files are, and the checkpoint has its name
    FAILED = 3


class Abandoned(Exception):
    """Another rank could not write its part."""


class NonFiniteStateError(NonFiniteError):
    """A tensor that was to be saved holds a number that is not finite."""


class Saver:
    """One rank's part in writing checkpoints.

    Every rank writes its own file; the main rank, rank 0, waits for those of the others, and names the folder. Ranks
    share nothing here but the folder: what each has reached is its `status`, which the caller lets all ranks know of.
    """

    def __init__(self, checkpoints: Checkpoints, *, rank: int, ranks: int) -> None:
        self.checkpoints, self.rank, self.ranks = checkpoints, rank, ranks
        self.status = Status.IDLE
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()
        self._copies = Copies({})
        self._partial = Path()
        atexit.register(self._leave)

    def prepare(self, step: int, size: int) -> None:
        """Make the folder to write to, on the main rank, before any rank begins. Raises OSError if it cannot be.

        size: bytes that all ranks together are about to write; if the disk has fewer, it says so before it is full.
        """
        partial = self._partial_path(step)
        self.checkpoints.clear()  # a rank that was still writing when a save was given up may have left its file
        self.checkpoints.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.checkpoints.folder).free
        if free < size:
            raise OSError(f"{partial} needs {size / 2**20:.0f} MiB, but only {free / 2**20:.0f} MiB are free")
        partial.mkdir()
        to_disk(self.checkpoints.folder.parent)

    def begin(
        self, step: int, tensors: Mapping[str, Tensor], spans: Mapping[str, Span], record: Mapping[str, Any]
    ) -> None:
        """Copy the tensors, and start to write them. record: what the main rank writes beside them, as JSON."""
        assert self.status is Status.IDLE, "the last checkpoint is still being written"
        self._partial = self._partial_path(step)
        self._abandoned.clear()
        try:
            copies = self._copy(tensors, spans)
        except (RuntimeError, MemoryError) as error:  # no memory for a copy: no checkpoint, which all are to know
            self.status, self.error = Status.FAILED, error
            return
        self.status, self.error = Status.WRITING, None
        arguments = (copies, dict(spans), json.loads(json.dumps(record)))
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def end(self, *, abandon: bool) -> None:
        """Take note that all ranks have written their parts or, abandon: that one could not, and nothing is to stay."""
        if abandon:
            self._abandoned.set()
        if self._thread is not None:
            self._thread.join()
        if abandon:
            if self.rank == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
        self.status, self._thread = Status.IDLE, None

    def _leave(self) -> None:
        """Before Python ends, which a thread would not survive: finish what depends on no other rank."""
        self._abandoned.set()
        if self._thread is not None:
            self._thread.join(LEAVE_SECONDS)

    def _partial_path(self, step: int) -> Path:
        path = self.checkpoints.path(step)
        return path.with_name(path.name + ".partial")

    def _copy(self, tensors: Mapping[str, Tensor], spans: Mapping[str, Span]) -> dict[str, Tensor]:
        """Fragments are views of what is trained, the same ones at each save; what else there is is small."""
        fragments = {key: tensor for key, tensor in tensors.items() if key in spans}
        if not self._copies.are_of(fragments):
            self._copies = Copies({})  # the memory of the old ones may be needed for the new ones
            self._copies = Copies(fragments)
        self._copies.take()
        others = Copies({key: tensor for key, tensor in tensors.items() if key not in spans})
        others.take()
        return self._copies.tensors | others.tensors

    def _run(self, copies: dict[str, Tensor], spans: Mapping[str, Span], record: Mapping[str, Any]) -> None:
        try:
            digest = self._write(copies, spans)
            if self.rank == 0:
                digests = {rank_file(0): digest, STATE: write_json(self._partial / STATE, record)}
                self.checkpoints.commit(self._partial, digests | self._digests_of_others())
                self.checkpoints.prune()
            self.status = Status.WRITTEN
        except Exception as error:  # told by the main thread: this one has nobody to raise it to
            self.error, self.status = error, Status.FAILED

    def _write(self, copies: dict[str, Tensor], spans: Mapping[str, Span]) -> Digest:
        """This rank's file, on the disk; the other ranks leave its digest beside it, for the main rank to collect."""
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
            told = path.with_suffix(".json")
            while not told.exists():
                if self._abandoned.is_set():
                    raise Abandoned("another rank could not write its part")
                time.sleep(POLL_SECONDS)
            digests[path.name] = Digest(**json.loads(told.read_text()))
            told.unlink()
        return digests
