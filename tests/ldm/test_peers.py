"""Ranks that died or hang are named, and nobody else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from ldm.commands import PEER_ERROR
from ldm.peers import DONE, ELSEWHERE, LONGEST_STEPS, REMEDY, STEP, Beat, Judge, PeerError, Watch, process_lives
from ldm.world import World

# os._exit, which does not return, is played by an exception.
pytestmark = pytest.mark.filterwarnings("ignore:Exception in thread guard")

HOST = "this-host"
HANG = 10.0
PATIENCE = 30.0  # of a test, in seconds: reached only when it fails


class Story:
    """What ranks tell a judge, at times that the test gives."""

    def __init__(self, *, ranks: int = 3) -> None:
        self.judge = Judge(HANG, HOST)
        self.ranks, self.now = ranks, 0.0
        self.counts, self.progress = [0] * ranks, [0] * ranks
        self.phases = [STEP] * ranks
        self.pids = [os.getpid()] * ranks

    def pass_time(
        self, seconds: float, *, silent: tuple[int, ...] = (), still: tuple[int, ...] = (), each: float = 1.0
    ) -> str | None:
        """All ranks beat and move on, but those that are named. Returns the first verdict."""
        for _ in range(round(seconds / each)):
            self.now += each
            for rank in set(range(self.ranks)) - set(silent):
                self.counts[rank] += 1
                self.progress[rank] += rank not in still
                self.hear(rank)
            verdict = self.judge.verdict(self.now)
            if verdict is not None:
                return verdict
        return None

    def hear(self, rank: int) -> None:
        beat = Beat(self.counts[rank], self.progress[rank], 7, self.phases[rank], self.pids[rank], HOST)
        self.judge.hear(rank, Beat.parse(str(beat).encode()), self.now)


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_beat_is_read_as_it_was_told():
    beat = Beat(3, 14, 15, STEP, 92, "a host with spaces")
    assert Beat.parse(str(beat).encode()) == beat


def test_ranks_that_move_on_are_left_alone():
    assert Story().pass_time(10 * HANG) is None


def test_before_anybody_is_heard_of_nobody_is_to_blame():
    assert Judge(HANG, HOST).verdict(1e9) is None


@pytest.mark.parametrize("phase", [STEP, ELSEWHERE])
def test_a_dead_rank_is_named_at_once(dead_pid: int, phase: str):
    story = Story()
    story.phases[1] = phase
    assert story.pass_time(5) is None
    story.pids[1] = dead_pid
    assert story.pass_time(1) == "rank 1 died"
    story.pids[2] = dead_pid
    assert story.pass_time(1) == "ranks 1, 2 died"


def test_a_rank_that_was_done_may_end(dead_pid: int):
    story = Story()
    story.pass_time(5)
    story.pids[1], story.phases[1] = dead_pid, DONE
    assert story.pass_time(1) is None
    assert story.pass_time(10 * HANG, silent=(1,)) is None


def test_processes_of_other_hosts_are_not_looked_for(dead_pid: int):
    judge = Judge(HANG, HOST)
    judge.hear(1, Beat(1, 1, 1, STEP, dead_pid, "another"), 0.0)
    assert judge.verdict(1.0) is None


@pytest.mark.parametrize("phase", [STEP, ELSEWHERE])
def test_a_silent_rank_is_named(phase: str):
    """Wherever it is: its thread beats while it is elsewhere too."""
    story = Story()
    story.phases[2] = phase
    assert story.pass_time(5) is None
    assert story.pass_time(HANG, silent=(2,)) is None
    assert story.pass_time(1, silent=(2,)) == "rank 2 has not answered for 11 s"
    assert story.judge.quiet(story.now, HANG) == [2]
    story.phases[2] = DONE
    story.hear(2)
    assert story.judge.quiet(story.now, 0) == []


def test_the_rank_that_the_others_wait_for_is_named():
    story = Story()
    assert story.pass_time(5) is None
    assert story.pass_time(1, still=(1,)) is None  # the others reach the end of the step, and wait there
    assert story.pass_time(HANG - 1, still=(0, 1, 2)) is None
    verdict = story.pass_time(5, still=(0, 1, 2))
    assert verdict is not None and verdict.startswith("rank 1 has not moved for ")


def test_when_all_stand_at_the_same_place_all_are_named():
    story = Story()
    story.pass_time(5)
    assert story.pass_time(2 * HANG, still=(0, 1, 2)) == "ranks 0, 1, 2 have not moved for 11 s"


@pytest.mark.parametrize("rank", range(3))
def test_nobody_is_blamed_while_a_rank_is_elsewhere(rank: int):
    """The main rank draws, or waits for a disk: the others wait for it."""
    story = Story()
    story.pass_time(5)
    story.phases[rank] = ELSEWHERE
    assert story.pass_time(20 * HANG, still=(0, 1, 2)) is None
    story.phases[rank] = STEP
    story.progress[rank] += 1
    assert story.pass_time(HANG, still=(0, 1, 2)) is None
    verdict = story.pass_time(HANG, still=(0, 1, 2))
    assert verdict is not None and f"rank {rank} " not in verdict


def test_nobody_is_blamed_before_the_first_step():
    story = Story()
    story.phases = [ELSEWHERE] * 3
    assert story.pass_time(20 * HANG, still=(0, 1, 2)) is None


def test_a_step_may_take_several_times_as_long_as_the_longest_before():
    """Such as the first one after a compilation, or a slow disk's."""
    story, long = Story(), 0.9 * HANG
    story.pass_time(5)
    story.pass_time(long, still=(0, 1, 2))
    story.pass_time(1)
    assert story.judge.longest_step == long + 1
    assert story.pass_time(LONGEST_STEPS * (long + 1), still=(0, 1, 2)) is None
    assert story.pass_time(2, still=(0, 1, 2)) is not None


def test_time_elsewhere_makes_nobody_more_patient():
    story = Story()
    story.pass_time(5)
    story.phases = [ELSEWHERE] * 3
    story.pass_time(50 * HANG, still=(0, 1, 2))
    story.phases = [STEP] * 3
    story.pass_time(3)
    assert story.judge.longest_step == 1
    assert story.pass_time(HANG + 2, still=(0, 1, 2)) is not None


def test_whether_a_process_lives(dead_pid: int):
    assert process_lives(os.getpid()) and process_lives(1) and not process_lives(dead_pid)
    zombie = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert zombie.stdout is not None
    zombie.stdout.read()  # until it has ended
    until(lambda: not process_lives(zombie.pid))
    zombie.wait()


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
        self.watches: list[Watch] = []
        self._kill = os.kill

    def exit(self, code: int) -> None:
        self.codes.append(code)
        raise SystemExit  # ends the thread

    def kill(self, pid: int, number: int) -> None:
        if number == 0:
            return self._kill(pid, number)
        self.killed.append((pid, number))

    def watch(self, rank: int, store: MemoryStore, *, ranks: int = 3, hang_seconds: float = PATIENCE) -> Watch:
        self.watches.append(Watch(World(rank, ranks, torch.device("cpu")), store, hang_seconds=hang_seconds))
        return self.watches[-1]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    found = Ends()
    monkeypatch.setattr("ldm.peers.BEAT_SECONDS", 0.01)
    monkeypatch.setattr("ldm.peers.os._exit", found.exit)
    monkeypatch.setattr("ldm.peers.os.kill", found.kill)
    yield found
    for watch in found.watches:
        watch._stopped.set()


def beat(*, count: int = 1, phase: str = STEP, pid: int) -> str:
    import socket

    return str(Beat(count, 1, 1, phase, pid, socket.gethostname()))


def test_a_single_process_watches_nobody():
    before = threading.active_count()
    watch = Watch(World(0, 1, torch.device("cpu")), None, hang_seconds=0.01)
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
    assert ends.codes == [PEER_ERROR] * 2 and content["verdict"] == "rank 1 died"
    told = capfd.readouterr().err.splitlines()
    assert sorted(told) == [
        f"error: rank 1 died, training being at step 5 (told by rank {rank}): {REMEDY}" for rank in (0, 2)
    ]
    assert not ends.killed


def test_a_rank_that_is_stopped_is_killed(ends: Ends, capfd: pytest.CaptureFixture[str]):
    """A process that is stopped hears nothing else, and its launcher would wait for it."""
    stopped = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        ends.watch(0, MemoryStore({"beat/1": beat(pid=stopped.pid)}), ranks=2, hang_seconds=0.3)
        until(lambda: ends.codes == [PEER_ERROR])
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
    until(lambda: ends.codes == [PEER_ERROR])
    assert "error: rank 0, where all ranks meet, is gone" in capfd.readouterr().err


def test_a_store_that_does_not_answer_is_rank_0s_hang(ends: Ends, capfd: pytest.CaptureFixture[str]):
    store = MemoryStore()
    ends.watch(2, store, hang_seconds=0.3)
    until(lambda: "beat/2" in store.content)
    store.answers.clear()
    until(lambda: ends.codes == [PEER_ERROR])
    assert "error: rank 0, where all ranks meet, has not answered for " in capfd.readouterr().err
    store.answers.set()


def test_who_is_done_needs_nobody_and_nobody_waits_for_it(ends: Ends):
    content: dict[str, str] = {}
    first, second = (MemoryStore(content) for _ in range(2))
    ends.watch(0, first, ranks=2).moved(1)
    other = ends.watch(1, second, ranks=2)
    other.moved(1)
    until(lambda: len(content) == 2)
    other.done()
    assert Beat.parse(content["beat/1"].encode()).phase == DONE
    second.gone = True
    before = Beat.parse(content["beat/0"].encode()).count
    until(lambda: Beat.parse(content["beat/0"].encode()).count > before + 3)
    assert not ends.codes


def test_rank_0_may_be_done_first(ends: Ends):
    """The store goes with it, which is no error of those who were about to say that they are done too."""
    store = MemoryStore()
    watch = ends.watch(1, store, ranks=2)
    watch._stopped.set()
    store.gone = True
    watch.done()
    assert not ends.codes


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
    assert Beat.parse(store.content["beat/1"].encode()).phase == DONE


def test_a_rank_says_where_it_is(ends: Ends):
    store = MemoryStore()
    watch = ends.watch(1, store, ranks=2)

    def told() -> tuple[int, int, str]:
        now = Beat.parse(store.content["beat/1"].encode())
        return now.progress, now.step, now.phase

    until(lambda: "beat/1" in store.content and told() == (0, 0, ELSEWHERE))
    watch.moved(41)
    until(lambda: told() == (1, 41, STEP))
    with watch.elsewhere():
        until(lambda: told() == (1, 41, ELSEWHERE))
    until(lambda: told() == (2, 41, STEP))
    assert not ends.codes


def test_after_a_broken_message_the_watch_looks_closer():
    watch = Watch(World(1, 2, torch.device("cpu")), None, hang_seconds=300)
    watch.moved(9)
    error = watch.lost(within=0)
    assert isinstance(error, PeerError) and str(error) == f"another rank ended at step 9: {REMEDY}"
    assert watch.judge.hang_seconds <= 2
