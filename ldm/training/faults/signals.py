"""SIGTERM and SIGINT: a training step is finished and saved first, anything else is given up at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ldm.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """What this process was asked by signals. A second SIGINT is a KeyboardInterrupt, wherever it is met."""

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that came
        self._deferred = False
        self._interrupted = False  # by SIGINT
        self._arrivals: int | None = None  # a pipe's end, where the system leaves the number of each signal that comes

    def listen(self) -> None:
        """Take over the signals of this process; to be called by its main thread."""
        for number in SIGNALS:
            signal.signal(number, self._hear)
        self._arrivals, entrance = os.pipe()
        for end in (self._arrivals, entrance):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(entrance, warn_on_full_buffer=False)

    @property
    def requested(self) -> bool:
        return self.name is not None

    def arrived(self) -> bool:
        """Whether a signal has come since this was last asked. It may not have been heard: while the main thread waits
        for a message from another rank, nothing in Python is told of signals."""
        if self._arrivals is None:
            return False
        try:
            return any(number in SIGNALS for number in os.read(self._arrivals, 1000))
        except BlockingIOError:  # none
            return False

    @property
    def obeys_at_once(self) -> bool:
        """Whether a signal that came now would end what is being done."""
        return not self._deferred

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal is only noted: the caller asks for it where it can be obeyed."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def interruptible(self, work: Callable[[], None]) -> bool:
        """Within `deferred`: do what may be given up, unless a signal came before. Returns whether it was done."""
        try:
            self._deferred = False  # first, so that no signal falls between the question and the work
            if self.requested:
                return False
            work()
            return True
        except Stopped:
            return False
        finally:
            self._deferred = True

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        again = number == signal.SIGINT and self._interrupted
        self._interrupted |= number == signal.SIGINT
        self.name = signal.Signals(number).name
        if again:
            raise KeyboardInterrupt
        if not self._deferred:
            self._deferred = True  # a launcher sends another signal soon, which must not disturb what this one begins
            raise Stopped
