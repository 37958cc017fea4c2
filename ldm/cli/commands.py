"""What all commands share: their words on the command line, and errors of one line with an exit code."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

USER_ERROR, DATA_ERROR, CHECKPOINT_ERROR, PEER_ERROR, NON_FINITE_ERROR = 2, 3, 4, 5, 6
INTERRUPTED = 130
IN_TRAINING = "in training"  # notes on errors that one rank may meet alone start so; before, all ranks meet the same


def training_arguments(description: str) -> argparse.ArgumentParser:
    """--config and section.key=value words, and --local_rank, which the deepspeed launcher adds."""
    parser = OneLineParser(description)
    parser.add_argument("--config", required=True, help="YAML file of the run, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


class OneLineParser(argparse.ArgumentParser):
    """Options in full only; a mistake in them is one line, which names the nearest option."""

    def __init__(self, description: str) -> None:
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=style, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (-[\w-]+)[^:]*: ", r"\1: ", message)  # without the option's other names
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            hint = f"did you mean {near[0]}?" if near else "--help lists all"
            message = f"unknown option {unknown[1]}, {hint}"
        self.exit(USER_ERROR, f"error: {' '.join(message.split())}\n")


def hyphenated(words: Sequence[str]) -> list[str]:
    """The same words, options written with underscores (--n_samples=2) with hyphens (--n-samples=2)."""
    return [re.sub(r"\A--[A-Za-z][\w-]*(?==|\Z)", lambda option: option[0].replace("_", "-"), word) for word in words]


def run_command(
    main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, words: Sequence[str] | None = None
) -> int:
    """Run main(args); a mistake becomes one line on stderr and an exit code (2 user, 3 data, 4
    checkpoint, 5 a rank that died or hangs, 6 NaN).

    words: of the command line; None: as it was given.
    """
    args = parser.parse_intermixed_args(words)
    # PyTorch reads it when it is loaded. When a rank is gone, the others' stores would print their stacks.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        main(args)
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        code = _exit_code(error)
        if args.debug or code is None:
            raise
        rank = os.environ.get("RANK", "0")
        alone = code in (USER_ERROR, DATA_ERROR) and any(note.startswith(IN_TRAINING) for note in _notes(error))
        alone |= code == PEER_ERROR  # rank 0 may be the one that is gone
        if os.environ.get("LOCAL_RANK", rank) == "0" or alone:  # once on each machine: its files are its own
            where = "" if rank == "0" else f"rank {rank}: "
            lost = "another rank ended: " if is_broken_connection(error) else ""
            print(f"error: {where}{lost}{one_line(error)}", file=sys.stderr)
        return code
    except BaseException as error:
        if type(error).__name__ != "Stopped":
            raise
        print("stopped by a signal outside of training: nothing is lost", flush=True)
    return 0


def one_line(error: BaseException) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())


def is_broken_connection(error: BaseException) -> bool:
    """Whether an error is that of a message between ranks, because one of them is no more."""
    told = str(error).lower()
    signs = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "broken pipe")
    return type(error).__name__ in ("DistNetworkError", "DistBackendError", "DistStoreError") or (
        isinstance(error, RuntimeError) and any(sign in told for sign in signs)
    )


def _notes(error: Exception) -> list[str]:
    return getattr(error, "__notes__", [])


def _exit_code(error: Exception) -> int | None:
    # Named by class, not imported: this file must answer --help before torch is loaded.
    codes = {"DataError": DATA_ERROR, "CheckpointError": CHECKPOINT_ERROR, "PeerError": PEER_ERROR}
    codes |= {"NonFiniteError": NON_FINITE_ERROR, "FloatingPointError": NON_FINITE_ERROR}
    if type(error).__name__ in codes:
        return codes[type(error).__name__]
    if is_broken_connection(error):
        return PEER_ERROR
    return USER_ERROR if isinstance(error, (ValueError, OSError)) else None
