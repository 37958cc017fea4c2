"""Handle SIGTERM and SIGINT: finish and save a training step first, abandon any other work at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ldm.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """The stop signal of this process, if one has come. A second SIGINT always raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.name: str | None = None  # of the last signal; after Ctrl-C SIGINT, though launchers then send SIGTERM
        self._deferred = False
        self._interrupted = False  # by SIGINT
        self._arrivals: int | None = None  # read end of the wakeup pipe: the number of each signal

    def listen(self) -> None:
        """Install the signal handlers. Call it from the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        self._arrivals, write_end = os.pipe()
        for end in (self._arrivals, write_end):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)

    @property
    def requested(self) -> bool:
        return self.name is not None

    def arrived(self) -> bool:
        """Return whether a signal has come since the last call, even if its handler has not run yet: Python runs no
        handler while the main thread waits for a message from another rank."""
        if self._arrivals is None:
            return False
        try:
            return any(number in SIGNALS for number in os.read(self._arrivals, 1000))
        except BlockingIOError:  # the pipe is empty
            return False

    @property
    def obeys_at_once(self) -> bool:
        """Whether a signal would interrupt the current work now."""
        return not self._deferred

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Context manager: signals are only recorded; the caller checks `requested` where it can stop."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def interruptible(self, work: Callable[[], None]) -> bool:
        """Within `deferred`: run work that a signal may interrupt. Returns whether it was completed."""
        try:
            self._deferred = False  # first, so that no signal is lost between the check and the work
            if self.requested:
                return False
            work()
            return True
        except Stopped:
            return False
        finally:
            self._deferred = True

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        again = number == signal.SIGINT and self._interrupted
        self._interrupted |= number == signal.SIGINT
        self.name = (signal.SIGINT if self._interrupted else signal.Signals(number)).name
        if again:
            raise KeyboardInterrupt
        if not self._deferred:
            self._deferred = True  # a launcher soon sends another signal, which must not disturb the shutdown
            raise Stopped
