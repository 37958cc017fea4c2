"""Commands run one after another without importing PyTorch and DeepSpeed for each: by forks of a process that has them.

This file is that process's program: each line that it reads is a JSON object, a Command; for each it writes a line with
the exit status.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess
from typing import TypedDict

ROOT = Path(__file__).parents[2]
SECONDS = 280  # after which a command is killed by SIGALRM: its exit status is -14


class Command(TypedDict):
    """What `python WORDS` is run with, by one process or by several ranks."""

    words: list[str]
    folder: str
    environments: list[dict[str, str]]  # of each rank
    outputs: tuple[str, str]  # files for what it prints and for its errors


class Forking:
    """Python in a folder; python: an interpreter that has our packages, otherwise the folder has them."""

    def __init__(self, folder: Path, python: Path | None = None) -> None:
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        own |= {} if python is not None else {"PYTHONPATH": str(folder)}
        self.folder, self.environment = folder, {"OMP_NUM_THREADS": "1"} | own
        self.process = subprocess.Popen(
            [python or sys.executable, __file__], cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=self.environment,
        )  # fmt: skip

    def complete(
        self, *words: str, folder: Path | None = None, environment: Mapping[str, str] | None = None, ranks: int = 1
    ) -> CompletedProcess[str]:
        """Run `python WORDS` in a folder, its own by default, with these environment variables too.

        ranks: how many processes do so, with the variables that launchers give them; the exit status is the first that
        is not 0.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with tempfile.TemporaryDirectory() as place:
            out, err = Path(place, "out"), Path(place, "err")
            command = Command(
                words=list(words),
                folder=str(folder or self.folder),
                environments=[self.environment | own | dict(environment or {}) for own in _of_ranks(ranks)],
                outputs=(str(out), str(err)),
            )
            print(json.dumps(command), file=self.process.stdin, flush=True)
            status = int(self.process.stdout.readline())
            return CompletedProcess(words, status, out.read_text(), err.read_text())

    def run(self, *words: str) -> str:
        """Run `python WORDS`, and return what it prints. Raises AssertionError if it fails."""
        done = self.complete(*words)
        assert done.returncode == 0, f"exit status {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def close(self) -> None:
        self.process.communicate("")


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _of_ranks(number: int) -> list[dict[str, str]]:
    if number == 1:
        return [{}]
    everyone = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **everyone} for rank in range(number)]


@cache
def python_here() -> Forking:
    """Python in this repository, of which a process of tests needs one."""
    forking = Forking(ROOT)
    atexit.register(forking.close)
    return forking


def run_here(command: Command, environment: Mapping[str, str]) -> int:
    """Do what `python WORDS` does, with its output in files."""
    words = command["words"]
    for stream, path in enumerate(command["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(command["folder"])
    os.environ.clear()
    os.environ.update(environment)
    signal.alarm(SECONDS)
    try:
        if words[0] in ("-m", "-c"):
            sys.argv = words[1:]
            sys.path.insert(0, command["folder"])
            if words[0] == "-m":
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                exec(words[1], {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no reply
    import deepspeed  # noqa: F401
    import open_clip  # noqa: F401
    import pytest  # noqa: F401
    import transformers.models.clip.modeling_clip  # noqa: F401

    sys.path.remove(str(Path(__file__).parent))  # where this file is, whose neighbours nobody asked for
    for line in sys.stdin:
        command: Command = json.loads(line)
        children: list[int] = []
        for environment in command["environments"]:
            if (child := os.fork()) == 0:
                status = run_here(command, environment)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(next((code for code in codes if code), 0), file=replies, flush=True)


if __name__ == "__main__":
    serve()
