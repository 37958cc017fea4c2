"""SIGTERM and SIGINT: a training step is finished and saved first, anything else is given up at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """Raised where nothing is lost by stopping. No Exception, so that nobody takes it for a failure of their own."""


class StopRequest:
    """What this process was asked by signals. A second SIGINT is a KeyboardInterrupt, wherever it is met."""

    def __init__(self) -> None:
        self.name: str | None = None  # of the signal that came
        self._deferred = False
        self._interrupted = False  # by SIGINT

    def listen(self) -> None:
        """Take over the signals of this process; to be called by its main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)

    @property
    def requested(self) -> bool:
        return self.name is not None

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
