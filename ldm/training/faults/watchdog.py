"""Ranks that died or hang: noticed, named, and the others ended, instead of all waiting for a message for ever.

Each rank's thread tells the store that the processes met at, twice a second, that it lives, and how far its training
has come. Rank 0 watches all; the others watch rank 0, and what it has found.
"""

from __future__ import annotations

import atexit
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
from ldm.training.engine.distributed import World
from ldm.training.faults.signals import StopRequest

BEAT_SECONDS = 0.5
LONGEST_STEPS = 5  # a step that takes so many times as long as the longest so far hangs, if hang_seconds are over too
ELSEWHERE_TIMES = 10  # so many times longer may what is no step take, while another rank waits for it
STEP, ELSEWHERE, DONE = "step", "elsewhere", "done"  # what a rank is at: only a step is expected to end soon
SUSPENDED_SECONDS = 5.0  # without a turn for a thread that wants one twice a second
VERDICT = "verdict"
STOP = "stop"  # a rank was asked to
REMEDY = "start again, and training goes on from the last checkpoint"


class Store(Protocol):
    """The part of torch.distributed's stores that is used."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


class Beat(NamedTuple):
    """What a rank tells of itself."""

    count: int  # of beats
    progress: int  # how often its training has moved on
    step: int  # that it works on
    phase: str
    pid: int
    host: str

    def __str__(self) -> str:
        return " ".join(map(str, self))

    @classmethod
    def parse(cls, text: bytes) -> Beat:
        count, progress, step, phase, pid, host = text.decode().split(" ", 5)
        return cls(int(count), int(progress), int(step), phase, int(pid), host)


@dataclass(slots=True)
class Seen:
    """What was last seen of a rank, and when it last changed."""

    beat: Beat
    beaten: float
    moved: float


@dataclass(slots=True)
class Judge:
    """Finds the ranks to blame in what they tell: no clock, no store."""

    hang_seconds: float
    host: str
    longest_step: float = 0.0
    seen: dict[int, Seen] = field(default_factory=dict)

    def hear(self, rank: int, beat: Beat, now: float) -> None:
        seen = self.seen.get(rank)
        if seen is None:
            self.seen[rank] = Seen(beat, now, now)
            return
        if beat.count != seen.beat.count:
            seen.beaten = now
        if beat.progress != seen.beat.progress:
            if seen.beat.phase == beat.phase == STEP:
                self.longest_step = max(self.longest_step, now - seen.moved)
            seen.moved = now
        seen.beat = beat

    def verdict(self, now: float) -> str | None:
        """Which ranks are to blame, and for what; None if there are none."""
        watched = {rank: seen for rank, seen in self.seen.items() if seen.beat.phase != DONE}
        gone = [rank for rank, seen in watched.items() if self._is_gone(seen.beat)]
        if gone:
            return f"{named(gone)} died"
        silent = [rank for rank, seen in watched.items() if now - seen.beaten > self.hang_seconds]
        if silent:
            return f"{having(silent)} not answered for {now - watched[silent[0]].beaten:.0f} s"
        patience = max(self.hang_seconds, LONGEST_STEPS * self.longest_step)
        limits = {STEP: patience, ELSEWHERE: ELSEWHERE_TIMES * patience}
        training = any(seen.beat.phase == STEP for seen in watched.values())
        if not training or any(now - seen.moved <= limits[seen.beat.phase] for seen in watched.values()):
            return None
        least = min(seen.beat.progress for seen in watched.values())
        away = [rank for rank, seen in watched.items() if seen.beat.phase == ELSEWHERE]  # the others wait for them
        stuck = away or [rank for rank, seen in watched.items() if seen.beat.progress == least]
        return f"{having(stuck)} not moved for {now - watched[stuck[0]].moved:.0f} s (engine.hang_seconds)"

    def quiet(self, now: float, seconds: float) -> list[int]:
        """The ranks that have not been heard of for so long."""
        return [r for r, seen in self.seen.items() if seen.beat.phase != DONE and now - seen.beaten > seconds]

    def _is_gone(self, beat: Beat) -> bool:
        return beat.host == self.host and not process_lives(beat.pid)


def named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def having(ranks: list[int]) -> str:
    return f"{named(ranks)} {'has' if len(ranks) == 1 else 'have'}"


def this_host() -> str:
    """A name of those among whom a process's number means the same: of a machine's start, and of its container."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # a system without /proc
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(parts).replace(" ", "-")


def process_lives(pid: int) -> bool:
    """Whether a process of this host runs, or waits; one that has ended and was not yet collected does neither."""
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except OSError:  # not ours to signal, or a system without /proc: it is there
        return True


class Watch:
    """This rank's threads: one talks to the store, one ends the process. A single process has no peers, and no threads.

    They are two because the store is kept by rank 0's process: if that stands still, so do all who talk to it.
    """

    def __init__(self, world: World, store: Store | None, *, hang_seconds: float, stop: StopRequest) -> None:
        self.world, self.store, self.hang_seconds, self.stop = world, store, hang_seconds, stop
        self.judge = Judge(hang_seconds, this_host())
        self._progress, self._step, self._phase, self._count = 0, 0, ELSEWHERE, 0
        self._talked = time.monotonic()
        self._found: str | None = None
        self._stopped = threading.Event()
        self._telling = threading.Lock()
        self._threads: list[threading.Thread] = []
        if store is not None:
            self._threads = [
                threading.Thread(target=self._talk, args=(store,), name="peers", daemon=True),
                threading.Thread(target=self._guard, name="guard", daemon=True),
            ]
            for thread in self._threads:
                thread.start()
            atexit.register(self._leave)

    def moved(self, step: int) -> None:
        """Training works on this step from now on."""
        self._progress, self._step, self._phase = self._progress + 1, step, STEP

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What may take longer than a step: drawing, measuring, waiting for a disk."""
        before, self._phase = self._phase, ELSEWHERE
        try:
            yield
        finally:
            self._progress, self._phase = self._progress + 1, before

    def done(self) -> None:
        """This rank needs no other any more, and none is to wait for it."""
        self._phase = DONE
        self._leave()
        if self.store is not None:
            with suppress(Exception):  # rank 0, which keeps it, may have left before
                self._tell(self.store)

    def _leave(self) -> None:
        """End the threads: one that is still within PyTorch when Python ends would end it with a crash."""
        self._stopped.set()
        for thread in self._threads:
            thread.join(4 * BEAT_SECONDS)

    def lost(self, error: Exception, *, within: float = 4.0) -> PeerError:
        """After a message between ranks that failed: wait for the verdict, which ends this process. Should none come,
        it returns the error to raise."""
        self.judge.hang_seconds = min(self.hang_seconds, 4 * BEAT_SECONDS)  # somebody is gone: look closer
        time.sleep(within)
        short = one_line(error, 200)
        return PeerError(f"another rank ended, or cannot be reached, at step {self._step} ({short}): {REMEDY}")

    def _talk(self, store: Store) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            try:
                self._tell(store)
                self._pass_on_stop(store)
                self._found = self._found or self._listen(store)
            except Exception:  # the store went with rank 0, or with the launcher
                first = self.judge.seen.get(0)
                if first is not None and first.beat.phase == DONE:
                    return  # it has ended well, and this rank is about to
                self._found = self._found or "rank 0, where all ranks meet, is gone"
            self._talked = time.monotonic()

    def _guard(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - last > SUSPENDED_SECONDS:  # it was this process that stood still (Ctrl-Z): all begins anew
                self._talked = now
                self.judge.seen.clear()
            last = now
            silence = time.monotonic() - self._talked
            if silence > self.hang_seconds:
                self._found = f"rank 0, where all ranks meet, has not answered for {silence:.0f} s"
            if self._found is not None:
                self._end(self._found)

    def _tell(self, store: Store) -> None:
        with self._telling:  # or the last beat, "done", might be overtaken by the one before
            self._count += 1
            beat = Beat(self._count, self._progress, self._step, self._phase, os.getpid(), self.judge.host)
            store.set(f"beat/{self.world.rank}", str(beat))

    def _pass_on_stop(self, store: Store) -> None:
        """Ranks tell each other at the end of a step that one was asked to stop; rank 0, which may be drawing for
        minutes while the others wait for it, is to know at once."""
        if self.stop.arrived():
            store.set(STOP, str(self.world.rank))
        elif self.world.is_main and not self.stop.requested and self.stop.obeys_at_once and store.check([STOP]):
            os.kill(os.getpid(), signal.SIGTERM)

    def _listen(self, store: Store) -> str | None:
        if store.check([VERDICT]):
            return store.get(VERDICT).decode()
        for rank in range(self.world.ranks) if self.world.is_main else (0,):
            key = f"beat/{rank}"
            if store.check([key]):
                self.judge.hear(rank, Beat.parse(store.get(key)), time.monotonic())
        verdict = self.judge.verdict(time.monotonic())
        if verdict is not None:
            store.set(VERDICT, verdict)
        return verdict

    def _end(self, verdict: str) -> None:
        """End this process, whose training thread waits for a message that will not come."""
        told = f"error: {verdict}, training being at step {self._step} (told by rank {self.world.rank}): {REMEDY}\n"
        print(told, end="", file=sys.stderr, flush=True)  # in one piece, though ranks speak at the same time
        for rank in self.judge.quiet(time.monotonic(), self.judge.hang_seconds):
            beat = self.judge.seen[rank].beat
            if beat.host == self.judge.host and beat.pid != os.getpid():
                with suppress(OSError):
                    os.kill(beat.pid, signal.SIGKILL)  # launchers wait half a minute for a process that is stopped
        time.sleep(2 * BEAT_SECONDS)  # so that the others can read the verdict
        os._exit(PeerError.exit_code)


def meeting_store(world: World) -> Store | None:
    """A connection of its own to the store that the processes met at, so that no wait of theirs holds it up."""
    if world.ranks == 1:
        return None
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
    # torchrun's store outlives the processes that it starts again: what their predecessors told is not theirs.
    return dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
