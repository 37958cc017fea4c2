"""The errors of all packages: one class per kind of fault, each with the exit code of the command that meets it.

A mistake of the user is a ValueError or an OSError, whose exit code is USER_ERROR. Nothing heavy is imported here.
"""

from __future__ import annotations

from typing import ClassVar

USER_ERROR = 2
INTERRUPTED = 130  # Ctrl-C, as in shells
IN_TRAINING = "in training"  # begins a note on errors that one rank may meet alone; before training, all meet the same


class DataError(Exception):
    """Something is wrong with the data itself (a shard, a sample), not with how it was asked for."""

    exit_code: ClassVar[int] = 3


class CheckpointError(Exception):
    """A checkpoint cannot be used for this run, or could not be written."""

    exit_code: ClassVar[int] = 4


class PeerError(Exception):
    """Another rank died or hangs."""

    exit_code: ClassVar[int] = 5


class NonFiniteError(FloatingPointError):
    """Losses, gradients, weights or pixels stopped being numbers."""

    exit_code: ClassVar[int] = 6


class Stopped(BaseException):
    """Raised by a signal where nothing is lost by stopping.

    Derives from BaseException, so that `except Exception` does not swallow it.
    """

    exit_code: ClassVar[int] = 0


def exit_code(error: BaseException) -> int | None:
    """The code with which a command ends that met this error; None for one that is a fault of this program."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    if is_broken_connection(error):
        return PeerError.exit_code
    return USER_ERROR if isinstance(error, (ValueError, OSError)) else None


def is_broken_connection(error: BaseException) -> bool:
    """Whether a message between ranks failed because one of them ended."""
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
    return type(error).__name__ in ("DistNetworkError", "DistBackendError", "DistStoreError") or (
        isinstance(error, RuntimeError) and any(sign in text for sign in signs)
    )
