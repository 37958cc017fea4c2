"""What the commands share: parsers of options, and errors reported in one line with an exit code."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from ldm.errors import IN_TRAINING, USER_ERROR, DataError, PeerError, Stopped, exit_code, is_broken_connection
from ldm.files.messages import did_you_mean, one_line, printable

# What tells OpenMP how to wait: any of them is the user's own choice.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
SPINS = "1000"  # rounds before a thread of GNU's OpenMP sleeps, some microseconds: many loops are as short as that
INTERRUPTED = 130  # exit code after Ctrl-C, as in shells


def training_arguments(description: str) -> argparse.ArgumentParser:
    """Build a parser for --config, section.key=value words, and --local_rank, which the deepspeed launcher adds."""
    parser = OneLineParser(description)
    parser.add_argument("--config", required=True, help="YAML file of the run, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace the file's")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=-1, help=argparse.SUPPRESS)
    return parser


class OneLineParser(argparse.ArgumentParser):
    """A parser without abbreviations of options. An error is one line, which suggests the nearest option."""

    def __init__(self, description: str) -> None:
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=style, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (-[\w-]+)[^:]*: ", r"\1: ", message)  # without the option's other names
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            near = did_you_mean(unknown[1], self._option_string_actions)
            hint = f"did you mean {near}?" if near else "--help lists all"
            message = f"unknown option {unknown[1]}, {hint}"
        self.exit(USER_ERROR, f"error: {' '.join(message.split())}\n")


def hyphenated(words: Sequence[str]) -> list[str]:
    """Replace underscores in options (--n_samples=2) by hyphens (--n-samples=2)."""
    return [re.sub(r"\A--[A-Za-z][\w-]*(?==|\Z)", lambda option: option[0].replace("_", "-"), word) for word in words]


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Context manager: print each warning of this program once, as one line on stderr; those of others as they are.

    They are about files and settings, which all ranks of a machine have in common: its first rank prints them.
    """
    others, shown = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *where: Any, **further: Any) -> None:
        text = f"warning: {printable(one_line(str(message)))}"
        if category is not UserWarning:
            others(message, category, *where, **further)
        elif text not in shown and os.environ.get("LOCAL_RANK", "0") == "0":
            shown.add(text)
            print(text, file=sys.stderr)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged pictures, without a name: our errors have one
        warnings.showwarning = show
        yield


def wait_politely() -> None:
    """Let OpenMP's threads sleep rather than spin when they wait for each other, unless the environment says otherwise.

    It has an effect before torch is loaded. Where another program uses a core, a spinning thread takes the time that
    the thread it waits for needs: training became three to twenty times slower.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ["GOMP_SPINCOUNT"] = SPINS


def run_command(
    main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser, words: Sequence[str] | None = None
) -> int:
    """Run main(args). An error becomes one line on stderr and an exit code (2 user, 3 data, 4 checkpoint, 5 a rank that
    died or hangs, 6 NaN).

    words: of the command line; None: sys.argv.
    """
    args = parser.parse_intermixed_args(words)
    # Set before torch is imported: otherwise, when a rank ends, the stores of the others print stack traces.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    wait_politely()
    try:
        with warnings_in_one_line():
            main(args)
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("error: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        code = exit_code(error)
        if args.debug or code is None:
            raise
        rank = os.environ.get("RANK", "0")
        in_training = any(note.startswith(IN_TRAINING) for note in getattr(error, "__notes__", ()))
        alone = code in (USER_ERROR, DataError.exit_code) and in_training
        alone |= code == PeerError.exit_code  # rank 0 may be the one that ended
        if os.environ.get("LOCAL_RANK", rank) == "0" or alone:  # once per machine, since each has its own files
            where = "" if rank == "0" else f"rank {rank}: "
            lost = "another rank ended: " if is_broken_connection(error) else ""
            print(f"error: {where}{lost}{one_line(error)}", file=sys.stderr)
        return code
    except Stopped:
        print("stopped by a signal outside of training: nothing is lost", flush=True)
    return 0
