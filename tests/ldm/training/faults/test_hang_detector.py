"""Ranks that died or hang are named, and nobody else is."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from ldm.training.faults.watchdog import (
    COMPILED_STEPS,
    DONE,
    ELSEWHERE,
    LONGEST_STEPS,
    STEP,
    HangDetector,
    Heartbeat,
    process_lives,
)

HOST = "this-host"
HANG = 10.0


class Story:
    """What ranks tell a detector, at times that the test gives."""

    def __init__(self, *, ranks: int = 3, compile_seconds: float = 0.0) -> None:
        self.detector = HangDetector(HANG, HOST, compile_seconds=compile_seconds)
        self.ranks, self.now, self.step = ranks, 0.0, 7
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
            verdict = self.detector.verdict(self.now)
            if verdict is not None:
                return verdict
        return None

    def hear(self, rank: int) -> None:
        beat = Heartbeat(self.counts[rank], self.progress[rank], self.step, self.phases[rank], self.pids[rank], HOST)
        self.detector.observe(rank, beat, self.now)


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_ranks_that_move_on_are_left_alone():
    assert Story().pass_time(10 * HANG) is None


def test_before_anybody_is_heard_of_nobody_is_to_blame():
    assert HangDetector(HANG, HOST).verdict(1e9) is None


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
    detector = HangDetector(HANG, HOST)
    detector.observe(1, Heartbeat(1, 1, 1, STEP, dead_pid, "another"), 0.0)
    assert detector.verdict(1.0) is None


@pytest.mark.parametrize("phase", [STEP, ELSEWHERE])
def test_a_silent_rank_is_named(phase: str):
    """Wherever it is: its thread beats while it is elsewhere too."""
    story = Story()
    story.phases[2] = phase
    assert story.pass_time(5) is None
    assert story.pass_time(HANG, silent=(2,)) is None
    assert story.pass_time(1, silent=(2,)) == "rank 2 has not answered for 11 s"
    assert story.detector.quiet(story.now, HANG) == [2]
    story.phases[2] = DONE
    story.hear(2)
    assert story.detector.quiet(story.now, 0) == []


def test_the_rank_that_the_others_wait_for_is_named():
    story = Story()
    assert story.pass_time(5) is None
    assert story.pass_time(1, still=(1,)) is None  # the others reach the end of the step, and wait there
    assert story.pass_time(HANG - 1, still=(0, 1, 2)) is None
    verdict = story.pass_time(5, still=(0, 1, 2))
    assert verdict is not None and verdict.startswith("rank 1 has made no progress for ")


def test_when_all_stand_at_the_same_place_all_are_named():
    story = Story()
    story.pass_time(5)
    verdict = story.pass_time(2 * HANG, still=(0, 1, 2))
    assert verdict == "ranks 0, 1, 2 have made no progress for 11 s (engine.hang_seconds)"


@pytest.mark.parametrize("rank", range(3))
def test_a_rank_may_be_elsewhere_for_ten_times_as_long(rank: int):
    """The main rank draws, or a rank waits for a disk or for data: the others wait for it."""
    story = Story()
    story.pass_time(5)
    story.phases[rank] = ELSEWHERE
    assert story.pass_time(9 * HANG, still=(0, 1, 2)) is None
    verdict = story.pass_time(2 * HANG, still=(0, 1, 2))
    assert verdict == f"rank {rank} has made no progress for 101 s (engine.hang_seconds)"
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
    assert story.detector.longest_step == long + 1
    assert story.pass_time(LONGEST_STEPS * (long + 1), still=(0, 1, 2)) is None
    assert story.pass_time(2, still=(0, 1, 2)) is not None


@pytest.mark.parametrize("steps", [0, 1])
def test_a_compiled_network_has_longer_for_its_first_two_steps(steps: int):
    """Of this process: a resumed run begins at any step."""
    story, compiling = Story(compile_seconds=4 * HANG), 4 * HANG
    story.pass_time(1)
    story.step += steps
    story.pass_time(1)
    assert story.pass_time(compiling - 2, still=(0, 1, 2)) is None
    verdict = story.pass_time(5, still=(0, 1, 2))
    assert verdict == "ranks 0, 1, 2 have made no progress for 41 s (engine.hang_seconds)"


def test_after_its_first_steps_a_compiled_network_hangs_as_soon_as_others():
    """The time of a compilation makes nobody more patient, either."""
    story = Story(compile_seconds=4 * HANG)
    for _ in range(COMPILED_STEPS):
        story.pass_time(1)
        assert story.pass_time(3 * HANG, still=(0, 1, 2)) is None
        story.step += 1
    story.pass_time(3)
    assert story.detector.longest_step == 1
    assert story.pass_time(HANG + 2, still=(0, 1, 2)) is not None


def test_a_compiled_networks_first_data_are_not_waited_for_any_longer():
    story = Story(compile_seconds=4 * HANG)
    story.pass_time(1)
    story.phases[1] = ELSEWHERE
    assert story.pass_time(10 * HANG - 1, still=(0, 1, 2)) is None
    assert story.pass_time(5, still=(0, 1, 2)) == "rank 1 has made no progress for 101 s (engine.hang_seconds)"


def test_time_elsewhere_makes_nobody_more_patient():
    story = Story()
    story.pass_time(5)
    story.phases = [ELSEWHERE] * 3
    story.pass_time(50 * HANG, still=(0, 1, 2))
    story.phases = [STEP] * 3
    story.pass_time(3)
    assert story.detector.longest_step == 1
    assert story.pass_time(HANG + 2, still=(0, 1, 2)) is not None


def test_whether_a_process_lives(dead_pid: int):
    assert process_lives(os.getpid()) and process_lives(1) and not process_lives(dead_pid)
    zombie = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert zombie.stdout is not None
    zombie.stdout.read()  # until it has ended
    deadline = time.monotonic() + 30
    while process_lives(zombie.pid):
        assert time.monotonic() < deadline
    zombie.wait()
