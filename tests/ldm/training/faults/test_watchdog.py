"""The threads that watch over ranks: what one finds ends all, and being done is no failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from ldm.errors import PeerError
from ldm.training.engine.distributed import Ranks
from ldm.training.faults.signals import StopSignal
from ldm.training.faults.watchdog import COMPILE_SECONDS, DONE, ELSEWHERE, REMEDY, STEP, Heartbeat, Watchdog, this_host

# os._exit, which does not return, is played by an exception.
pytestmark = pytest.mark.filterwarnings("ignore:Exception in thread guard")

PATIENCE = 30.0  # of a test, in seconds: reached only when it fails


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


class MemoryStore:
    """As the ranks' store, in this process. It can be made to block, or to be gone, for whoever has this handle."""

    def __init__(self, content: dict[str, str] | None = None) -> None:
        self.content: dict[str, str] = {} if content is None else content
        self.answers, self.gone = threading.Event(), False
        self.answers.set()

    def set(self, key: str, value: str, /) -> None:
        self._answer()
        self.content[key] = value

    def get(self, key: str, /) -> bytes:
        self._answer()
        return self.content[key].encode()

    def check(self, keys: list[str], /) -> bool:
        self._answer()
        return all(key in self.content for key in keys)

    def _answer(self) -> None:
        self.answers.wait(PATIENCE)
        if self.gone:
            raise RuntimeError("Connection reset by peer")


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.002)


class Ends:
    """What the watches of this process do to processes: noted, not done."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.killed: list[tuple[int, int]] = []
        self.watches: list[Watchdog] = []
        self._kill = os.kill

    def exit(self, code: int) -> None:
        self.codes.append(code)
        raise SystemExit  # ends the thread

    def kill(self, pid: int, number: int) -> None:
        if number == 0:
            return self._kill(pid, number)
        self.killed.append((pid, number))

    def watch(
        self,
        rank: int,
        store: MemoryStore,
        *,
        ranks: int = 3,
        hang_seconds: float = PATIENCE,
        stop: StopSignal | None = None,
    ) -> Watchdog:
        world = Ranks(rank, ranks, torch.device("cpu"))
        self.watches.append(Watchdog(world, store, hang_seconds=hang_seconds, stop=stop or StopSignal()))
        return self.watches[-1]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    found = Ends()
    monkeypatch.setattr("ldm.training.faults.watchdog.BEAT_SECONDS", 0.01)
    monkeypatch.setattr("ldm.training.faults.watchdog.os._exit", found.exit)
    monkeypatch.setattr("ldm.training.faults.watchdog.os.kill", found.kill)
    yield found
    for watch in found.watches:
        watch._stopped.set()


def beat(*, count: int = 1, phase: str = STEP, pid: int) -> str:
    return json.dumps(Heartbeat(count, 1, 1, phase, pid, this_host()))


def test_a_single_process_watches_nobody():
    before = threading.active_count()
    watch = Watchdog(Ranks(0, 1, torch.device("cpu")), None, hang_seconds=0.01, stop=StopSignal())
    watch.moved(1)
    with watch.elsewhere():
        pass
    watch.done()
    assert threading.active_count() == before


def test_what_rank_0_finds_ends_all_ranks(ends: Ends, dead_pid: int, capfd: pytest.CaptureFixture[str]):
    content = {"beat/1": beat(pid=dead_pid)}
    for rank in (0, 2):
        ends.watch(rank, MemoryStore(content)).moved(5)
    until(lambda: len(ends.codes) == 2)
    assert ends.codes == [PeerError.exit_code] * 2 and content["verdict"] == "rank 1 died"
    told = capfd.readouterr().err.splitlines()
    assert sorted(told) == [
        f"error: rank 1 died while training was at step 5 (rank {rank} reports): {REMEDY}" for rank in (0, 2)
    ]
    assert not ends.killed


def test_a_rank_that_is_stopped_is_killed(ends: Ends, capfd: pytest.CaptureFixture[str]):
    """A process that is stopped hears nothing else, and its launcher would wait for it."""
    stopped = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        ends.watch(0, MemoryStore({"beat/1": beat(pid=stopped.pid)}), ranks=2, hang_seconds=0.3)
        until(lambda: ends.codes == [PeerError.exit_code])
    finally:
        stopped.communicate(b"\n")
    assert "error: rank 1 has not answered for " in capfd.readouterr().err
    assert ends.killed == [(stopped.pid, signal.SIGKILL)]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_store_that_is_gone_is_rank_0s_end(ends: Ends, rank: int, capfd: pytest.CaptureFixture[str]):
    store = MemoryStore()
    ends.watch(rank, store)
    until(lambda: f"beat/{rank}" in store.content)
    store.gone = True
    until(lambda: ends.codes == [PeerError.exit_code])
    assert "error: rank 0, which hosts the store of all ranks, is gone" in capfd.readouterr().err


def test_a_store_that_does_not_answer_is_rank_0s_hang(ends: Ends, capfd: pytest.CaptureFixture[str]):
    store = MemoryStore()
    ends.watch(2, store, hang_seconds=0.3)
    until(lambda: "beat/2" in store.content)
    store.answers.clear()
    until(lambda: ends.codes == [PeerError.exit_code])
    assert "error: rank 0, which hosts the store of all ranks, has not answered for " in capfd.readouterr().err
    store.answers.set()


def test_who_is_done_needs_nobody_and_nobody_waits_for_it(ends: Ends):
    content: dict[str, str] = {}
    first, second = (MemoryStore(content) for _ in range(2))
    ends.watch(0, first, ranks=2).moved(1)
    other = ends.watch(1, second, ranks=2)
    other.moved(1)
    until(lambda: len(content) == 2)
    other.done()
    assert Heartbeat(*json.loads(content["beat/1"])).phase == DONE
    second.gone = True
    before = Heartbeat(*json.loads(content["beat/0"])).count
    until(lambda: Heartbeat(*json.loads(content["beat/0"])).count > before + 3)
    assert not ends.codes


def test_rank_0_may_be_done_first(ends: Ends):
    """The store goes with it, which is no error of those who were about to say that they are done too."""
    store = MemoryStore()
    watch = ends.watch(1, store, ranks=2)
    watch._stopped.set()
    store.gone = True
    watch.done()
    assert not ends.codes


def test_rank_0_may_end_well_before_the_others_say_that_they_are_done(ends: Ends):
    """Its store is gone then, but it was done: nobody is to blame."""
    store = MemoryStore({"beat/0": json.dumps(Heartbeat(9, 9, 9, DONE, os.getpid(), this_host()))})
    watch = ends.watch(1, store)
    until(lambda: 0 in watch.detector.seen)
    store.gone = True
    until(lambda: not watch._threads[0].is_alive())
    assert watch._found is None and not ends.codes


def test_being_done_is_the_last_that_is_told(ends: Ends):
    """A beat from before that arrived after it would be taken for the last of a rank that died."""
    held, release = threading.Event(), threading.Event()

    class Slow(MemoryStore):
        def set(self, key: str, value: str, /) -> None:
            if not held.is_set():
                held.set()
                release.wait(PATIENCE)
            super().set(key, value)

    store = Slow()
    watch = ends.watch(1, store, ranks=2)
    assert held.wait(PATIENCE)
    saying = threading.Thread(target=watch.done)
    saying.start()
    saying.join(0.1)
    release.set()
    saying.join()
    until(lambda: not any(thread.name == "peers" for thread in threading.enumerate()))
    assert Heartbeat(*json.loads(store.content["beat/1"])).phase == DONE


def test_a_rank_says_where_it_is(ends: Ends):
    store = MemoryStore()
    watch = ends.watch(1, store, ranks=2)

    def told() -> tuple[int, int, str]:
        now = Heartbeat(*json.loads(store.content["beat/1"]))
        return now.progress, now.step, now.phase

    until(lambda: "beat/1" in store.content and told() == (0, 0, ELSEWHERE))
    watch.moved(41)
    until(lambda: told() == (1, 41, STEP))
    with watch.elsewhere():
        until(lambda: told() == (1, 41, ELSEWHERE))
    until(lambda: told() == (2, 41, STEP))
    assert not ends.codes


def test_after_a_broken_message_the_watch_looks_closer():
    watch = Watchdog(Ranks(1, 2, torch.device("cpu")), None, hang_seconds=300, stop=StopSignal())
    watch.moved(9)
    error = watch.lost(RuntimeError("Connection\nclosed"), within=0)
    expected = f"another rank ended, or cannot be reached, at step 9 (Connection closed): {REMEDY}"
    assert isinstance(error, PeerError) and str(error) == expected
    assert watch.detector.hang_seconds <= 2


@pytest.mark.parametrize(("compiles", "seconds"), [(True, COMPILE_SECONDS), (False, 0.0)])
def test_only_a_compiled_network_has_longer_for_its_first_steps(compiles: bool, seconds: float):
    world = Ranks(0, 1, torch.device("cpu"))
    watch = Watchdog(world, None, hang_seconds=300, compiles=compiles, stop=StopSignal())
    assert watch.detector.compile_seconds == seconds


def test_a_rank_that_was_asked_to_stop_ends_what_rank_0_draws(ends: Ends, monkeypatch: pytest.MonkeyPatch):
    """And nothing else: what rank 0 takes note of by itself at the end of its step is not disturbed."""
    content: dict[str, str] = {}
    asked, drawing = StopSignal(), StopSignal()
    monkeypatch.setattr(asked, "arrived", iter([False, True, *[False] * 10**6]).__next__)
    ends.watch(1, MemoryStore(content), stop=asked)
    main = ends.watch(0, MemoryStore(content), stop=drawing)
    with drawing.deferred():
        until(lambda: "stop" in content)
        told = main._count
        until(lambda: main._count > told + 2)
        assert not ends.killed
        drawing.interruptible(lambda: until(lambda: bool(ends.killed)))
    told = main._count
    until(lambda: main._count > told + 2)
    assert set(ends.killed) == {(os.getpid(), signal.SIGTERM)} and not ends.codes


def test_rank_0_is_not_told_again_of_what_it_has_heard(ends: Ends):
    """Or a signal would come while it reports an error, and end it with another code."""
    heard = StopSignal()
    heard.name = "SIGTERM"
    main = ends.watch(0, MemoryStore({"stop": "1"}), stop=heard)
    until(lambda: main._count > 3)
    assert heard.obeys_at_once and not ends.killed


def test_nobody_is_stopped_where_nobody_was_asked_to(ends: Ends):
    content: dict[str, str] = {}
    watches = [ends.watch(rank, MemoryStore(content)) for rank in range(2)]
    until(lambda: all(watch._count > 3 for watch in watches))
    assert "stop" not in content and not ends.killed
