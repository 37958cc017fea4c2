"""Run a command, and report errors in one line with an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from ldm.errors import (
    IN_TRAINING,
    INTERRUPTED,
    USER_ERROR,
    DataError,
    PeerError,
    Stopped,
    exit_code,
    is_broken_connection,
)
from ldm.files.messages import one_line


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
    try:
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
