"""A lock that objects which are copied or pickled may hold."""

from __future__ import annotations

import threading
from types import TracebackType


class Turns:
    """Lets one thread at a time in; it may enter again. A copy is a new lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()
