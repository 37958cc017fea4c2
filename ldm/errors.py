"""Errors of all packages: one class per kind of fault, each with the exit code of the command.

User errors are ValueError or OSError, with exit code USER_ERROR. Nothing heavy is imported here.
"""

from __future__ import annotations

from typing import ClassVar

USER_ERROR = 2
IN_TRAINING = "in training"  # starts a note on errors that only one rank may raise; before training, all raise the same


class DataError(Exception):
    """The data itself (a shard, a sample) is faulty, not the request for it."""

    exit_code: ClassVar[int] = 3


class CheckpointError(Exception):
    """A checkpoint cannot be used for this run, or could not be written."""

    exit_code: ClassVar[int] = 4


class PeerError(Exception):
    """Another rank died or hangs."""

    exit_code: ClassVar[int] = 5


class NonFiniteError(FloatingPointError):
    """Losses, gradients, weights or pixels are no longer finite."""

    exit_code: ClassVar[int] = 6


class Stopped(BaseException):
    """Raised by a signal when stopping loses no work.

    Derives from BaseException, so that `except Exception` does not swallow it.
    """

    exit_code: ClassVar[int] = 0


def exit_code(error: BaseException) -> int | None:
    """Return the exit code for this error; None if it is a bug in this program."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    if is_broken_connection(error):
        return PeerError.exit_code
    return USER_ERROR if isinstance(error, (ValueError, OSError)) else None


def is_broken_connection(error: BaseException) -> bool:
    """Return whether communication between ranks failed because one of them ended."""
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
    return type(error).__name__ in ("DistNetworkError", "DistBackendError", "DistStoreError") or (
        isinstance(error, RuntimeError) and any(sign in text for sign in signs)
    )
