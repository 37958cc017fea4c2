"""Watchdog: find ranks that died or hang, name them, and end the others, which would wait for them for ever.

Twice a second, a thread of each rank writes a heartbeat with the progress of its training to the store at which the
processes met. Rank 0 watches all ranks; the others watch rank 0 and its verdict.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, Protocol

from ldm.errors import PeerError
from ldm.files.messages import one_line
from ldm.training.engine.distributed import Ranks
from ldm.training.faults.signals import StopSignal

BEAT_SECONDS = 0.5
LONGEST_STEPS = 5  # a step hangs after this many times the longest step so far, and after hang_seconds
# torch.compile works in the first two steps of a process, minutes for a large network: they hang after half an hour.
COMPILED_STEPS, COMPILE_SECONDS = 2, 1800.0
ELSEWHERE_TIMES = 10  # factor by which drawing, saving or loading data may exceed a step's time limit
STEP, ELSEWHERE, DONE = "step", "elsewhere", "done"  # phases of a rank: only a step has a short time limit
SUSPENDED_SECONDS = 5.0  # a thread due twice a second did not run: the process was suspended
VERDICT = "verdict"
STOP = "stop"  # key: a rank received a stop signal
REMEDY = "start again, and training resumes from the last checkpoint"


class Store(Protocol):
    """The methods of torch.distributed's stores that are used here."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


class Heartbeat(NamedTuple):
    """What each rank reports about itself."""

    count: int  # of heartbeats
    progress: int  # steps and other phases completed
    step: int  # in progress
    phase: str
    pid: int
    host: str


@dataclass(slots=True)
class LastSeen:
    """The last heartbeat of a rank, and when its count and its progress last changed."""

    heartbeat: Heartbeat
    beat_at: float
    moved_at: float


@dataclass(slots=True)
class HangDetector:
    """Finds the ranks to blame from their heartbeats. It reads no clock and no store."""

    hang_seconds: float
    host: str
    compile_seconds: float = 0.0  # time limit of the first steps, if it is above the usual one; 0: none is compiled
    longest_step: float = 0.0  # of those that are not compiled
    first_step: float = math.inf  # of this process: a resumed run does not begin at step 1
    seen: dict[int, LastSeen] = field(default_factory=dict)

    def observe(self, rank: int, beat: Heartbeat, now: float) -> None:
        if beat.step > 0:
            self.first_step = min(self.first_step, beat.step)
        seen = self.seen.get(rank)
        if seen is None:
            self.seen[rank] = LastSeen(beat, now, now)
            return
        if beat.count != seen.heartbeat.count:
            seen.beat_at = now
        if beat.progress != seen.heartbeat.progress:
            if seen.heartbeat.phase == beat.phase == STEP and not self._compiles(seen.heartbeat):
                self.longest_step = max(self.longest_step, now - seen.moved_at)
            seen.moved_at = now
        seen.heartbeat = beat

    def verdict(self, now: float) -> str | None:
        """Name the ranks to blame and the reason; None if no rank is."""
        watched = {rank: seen for rank, seen in self.seen.items() if seen.heartbeat.phase != DONE}
        gone = [rank for rank, seen in watched.items() if self._is_gone(seen.heartbeat)]
        if gone:
            return f"{name_ranks(gone)} died"
        silent = [rank for rank, seen in watched.items() if now - seen.beat_at > self.hang_seconds]
        if silent:
            return f"{ranks_have(silent)} not answered for {now - watched[silent[0]].beat_at:.0f} s"
        patience = max(self.hang_seconds, LONGEST_STEPS * self.longest_step)
        limits = {STEP: patience, ELSEWHERE: ELSEWHERE_TIMES * patience}
        if any(self._compiles(seen.heartbeat) for seen in watched.values()):
            limits[STEP] = max(patience, self.compile_seconds)
        training = any(seen.heartbeat.phase == STEP for seen in watched.values())
        if not training or any(now - seen.moved_at <= limits[seen.heartbeat.phase] for seen in watched.values()):
            return None
        least = min(seen.heartbeat.progress for seen in watched.values())
        away = [rank for rank, seen in watched.items() if seen.heartbeat.phase == ELSEWHERE]  # others wait for these
        stuck = away or [rank for rank, seen in watched.items() if seen.heartbeat.progress == least]
        stalled = now - watched[stuck[0]].moved_at
        return f"{ranks_have(stuck)} made no progress for {stalled:.0f} s (engine.hang_seconds)"

    def quiet(self, now: float, seconds: float) -> list[int]:
        """List the ranks without a heartbeat for this many seconds."""
        return [r for r, seen in self.seen.items() if seen.heartbeat.phase != DONE and now - seen.beat_at > seconds]

    def _compiles(self, beat: Heartbeat) -> bool:
        return self.compile_seconds > 0 and beat.step < self.first_step + COMPILED_STEPS

    def _is_gone(self, beat: Heartbeat) -> bool:
        return beat.host == self.host and not process_lives(beat.pid)


def name_ranks(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def ranks_have(ranks: list[int]) -> str:
    return f"{name_ranks(ranks)} {'has' if len(ranks) == 1 else 'have'}"


def this_host() -> str:
    """Identify the PID namespace: host name, boot and container. A process ID has one meaning within it."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # a system without /proc
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(parts)


def process_lives(pid: int) -> bool:
    """Return whether a process of this host is alive. A zombie (ended, but not yet waited for) is not."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # another user's process, or a system without /proc: it is alive
        return True


class Watchdog:
    """Two threads of this rank: one talks to the store, one ends the process. A single process needs neither.

    They are two because rank 0's process hosts the store: if it is suspended, every thread that talks to it blocks.
    """

    def __init__(
        self, world: Ranks, store: Store | None, *, hang_seconds: float, compiles: bool = False, stop: StopSignal
    ) -> None:
        """compiles: whether torch.compile works in the first steps, which may then take COMPILE_SECONDS each."""
        self.world, self.store, self.hang_seconds, self.stop = world, store, hang_seconds, stop
        self.detector = HangDetector(hang_seconds, this_host(), compile_seconds=COMPILE_SECONDS if compiles else 0.0)
        self._progress, self._step, self._phase, self._count = 0, 0, ELSEWHERE, 0
        self._exchanged = time.monotonic()
        self._found: str | None = None
        self._stopped = threading.Event()
        self._sending = threading.Lock()
        self._threads: list[threading.Thread] = []
        if store is not None:
            self._threads = [
                threading.Thread(target=self._exchange, args=(store,), name="peers", daemon=True),
                threading.Thread(target=self._guard, name="guard", daemon=True),
            ]
            for thread in self._threads:
                thread.start()
            atexit.register(self._leave)

    def moved(self, step: int) -> None:
        """Record that training now works on this step."""
        self._progress, self._step, self._phase = self._progress + 1, step, STEP

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Context manager for work that may take longer than a step: drawing, evaluation, waiting for a disk."""
        before, self._phase = self._phase, ELSEWHERE
        try:
            yield
        finally:
            self._progress, self._phase = self._progress + 1, before

    def done(self) -> None:
        """Record that this rank is finished: it waits for no other rank, and none should wait for it."""
        self._phase = DONE
        self._leave()
        if self.store is not None:
            with suppress(Exception):  # rank 0, which hosts it, may have ended before
                self._send(self.store)

    def _leave(self) -> None:
        """End the threads: one that is still inside PyTorch at interpreter exit would crash the process."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(4 * BEAT_SECONDS)

    def lost(self, error: Exception, *, within: float = 4.0) -> PeerError:
        """After a failed collective operation: wait for the verdict, which ends this process. If none comes, return
        the error to raise."""
        self.detector.hang_seconds = min(self.hang_seconds, 4 * BEAT_SECONDS)  # a rank is gone: shorten the limit
        time.sleep(within)
        short = one_line(error, 200)
        return PeerError(f"another rank ended, or cannot be reached, at step {self._step} ({short}): {REMEDY}")

    def _exchange(self, store: Store) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                self._send(store)
                self._forward_stop(store)
                self._found = self._found or self._receive(store)
            except Exception:  # the store ended with rank 0, or with the launcher
                first = self.detector.seen.get(0)
                if first is not None and first.heartbeat.phase == DONE:
                    return  # it has finished, and this rank is about to
                self._found = self._found or "rank 0, which hosts the store of all ranks, is gone"
            self._exchanged = time.monotonic()

    def _guard(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - last > SUSPENDED_SECONDS:  # this process itself was suspended (Ctrl-Z): reset all timers
                self._exchanged = now
                self.detector.seen.clear()
            last = now
            silence = time.monotonic() - self._exchanged
            if silence > self.hang_seconds:
                self._found = f"rank 0, which hosts the store of all ranks, has not answered for {silence:.0f} s"
            if self._found is not None:
                self._end(self._found)

    def _send(self, store: Store) -> None:
        with self._sending:  # so that an earlier heartbeat cannot overtake the last one, "done"
            self._count += 1
            beat = Heartbeat(self._count, self._progress, self._step, self._phase, os.getpid(), self.detector.host)
            store.set(f"beat/{self.world.rank}", json.dumps(beat))

    def _forward_stop(self, store: Store) -> None:
        """Forward a stop signal to rank 0 at once: the ranks exchange it at the end of a step, but rank 0 may draw for
        minutes while the others wait for it."""
        if self.stop.arrived():
            store.set(STOP, str(self.world.rank))
        elif self.world.is_main and not self.stop.requested and self.stop.obeys_at_once and store.check([STOP]):
            os.kill(os.getpid(), signal.SIGTERM)

    def _receive(self, store: Store) -> str | None:
        if store.check([VERDICT]):
            return store.get(VERDICT).decode()
        for rank in range(self.world.ranks) if self.world.is_main else (0,):
            key = f"beat/{rank}"
            if store.check([key]):
                self.detector.observe(rank, Heartbeat(*json.loads(store.get(key))), time.monotonic())
        verdict = self.detector.verdict(time.monotonic())
        if verdict is not None:
            store.set(VERDICT, verdict)
        return verdict

    def _end(self, verdict: str) -> None:
        """End this process: its training thread waits for a message that will not come."""
        line = f"error: {verdict} while training was at step {self._step} (rank {self.world.rank} reports): {REMEDY}\n"
        print(line, end="", file=sys.stderr, flush=True)  # in one write, so that the ranks' lines do not mix
        for rank in self.detector.quiet(time.monotonic(), self.detector.hang_seconds):
            beat = self.detector.seen[rank].heartbeat
            if beat.host == self.detector.host and beat.pid != os.getpid():
                with suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)  # launchers would wait half a minute for a suspended process
        time.sleep(2 * BEAT_SECONDS)  # so that the others can read the verdict
        os._exit(PeerError.exit_code)


def meeting_store(world: Ranks) -> Store | None:
    """Open a separate connection to the store at which the processes met, so that no other wait blocks it."""
    if world.ranks == 1:
        return None
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
    # torchrun's store survives a restart of the processes: a prefix hides the keys of the earlier attempts.
    return dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
