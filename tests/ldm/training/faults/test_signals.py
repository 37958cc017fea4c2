"""Signals, sent to this process itself: obeyed where nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldm.training.faults.signals import Stopped, StopSignal

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    request = StopSignal()
    request.listen()
    yield request
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@BOTH
def test_where_nothing_is_lost_a_signal_stops_at_once(stop: StopSignal, number: signal.Signals):
    assert not stop.requested and stop.name is None
    with pytest.raises(Stopped):
        send(number)
    assert stop.requested and stop.name == number.name


def test_nobody_takes_it_for_an_error_of_their_own(stop: StopSignal):
    with pytest.raises(Stopped):
        try:
            send(signal.SIGTERM)
        except Exception:
            pytest.fail("it was caught")


@BOTH
def test_a_deferred_signal_is_only_noted(stop: StopSignal, number: signal.Signals):
    with stop.deferred():
        send(number)
        assert stop.requested and stop.name == number.name
    assert stop.requested


def test_afterwards_signals_stop_at_once_again(stop: StopSignal):
    with stop.deferred():
        send(signal.SIGTERM)
    with pytest.raises(Stopped):
        send(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), stop.deferred():
        raise ZeroDivisionError
    with pytest.raises(Stopped):
        send(signal.SIGTERM)


def test_a_second_sigint_is_obeyed_even_if_deferred(stop: StopSignal):
    with stop.deferred():
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_after_ctrl_c_the_launchers_sigterm_does_not_take_its_name(stop: StopSignal):
    with stop.deferred():
        send(signal.SIGINT)
        send(signal.SIGTERM)
        assert stop.name == "SIGINT"


def test_sigterm_may_come_as_often_as_it_likes(stop: StopSignal):
    """Schedulers and launchers send it again and again, while the step is finished and saved."""
    with stop.deferred():
        for _ in range(5):
            send(signal.SIGTERM)
        send(signal.SIGINT)
    assert stop.name == "SIGINT"


def test_a_launchers_sigterm_in_between_makes_the_second_sigint_no_first(stop: StopSignal):
    """After Ctrl-C, which reaches all processes, a launcher sends each a SIGTERM too."""
    with stop.deferred():
        send(signal.SIGINT)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@BOTH
def test_what_may_be_given_up_is(stop: StopSignal, number: signal.Signals):
    done = []

    def work() -> None:
        done.append("begun")
        send(number)
        done.append("ended")

    with stop.deferred():
        assert not stop.interruptible(work)
        assert done == ["begun"] and stop.name == number.name
        send(signal.SIGTERM)  # deferred again


def test_what_is_not_interrupted_is_done(stop: StopSignal):
    done = []
    with stop.deferred():
        assert stop.interruptible(lambda: done.append(1))
        assert done == [1] and not stop.requested
        send(signal.SIGTERM)  # deferred again


def test_after_a_signal_nothing_is_begun_that_would_be_given_up(stop: StopSignal):
    with stop.deferred():
        send(signal.SIGTERM)
        assert not stop.interruptible(lambda: pytest.fail("it was begun"))


def test_errors_of_the_work_are_its_own(stop: StopSignal):
    with stop.deferred():
        with pytest.raises(ZeroDivisionError):
            stop.interruptible(lambda: print(1 // 0))
        send(signal.SIGTERM)  # deferred again


@BOTH
def test_a_signal_has_arrived_before_it_is_heard(stop: StopSignal, number: signal.Signals):
    """As another thread sees it while the main thread is held up outside of Python: played by the other way round."""
    assert not StopSignal().arrived() and not stop.arrived()
    with stop.deferred():
        send(number)
        assert stop.arrived() and not stop.arrived()
        os.kill(os.getpid(), signal.SIGCONT)  # no request to stop
        assert not stop.arrived()


def test_a_thread_sees_what_the_main_thread_cannot_hear():
    """The main thread waits in C, and nothing in Python runs there until it is over."""
    script = """
import ctypes, os, signal, threading, time
from ldm.training.faults.signals import StopSignal

stop = StopSignal()
stop.listen()

def watch():
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)
    while not stop.arrived():
        time.sleep(0.01)
    print(stop.requested, flush=True)
    os._exit(0)

threading.Thread(target=watch).start()
mutex, lock = ctypes.create_string_buffer(256), ctypes.CDLL(None).pthread_mutex_lock
lock(mutex)
lock(mutex)  # for ever
"""
    command = [sys.executable, "-c", script]
    finished = subprocess.run(
        command, cwd=Path(__file__).parents[4], capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.stdout == "False\n", finished.stderr
