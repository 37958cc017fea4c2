"""Commands run one after another without importing PyTorch and DeepSpeed for each: by forks of a process that has them.

This file is that process's program: each line that it reads is a JSON list, a file for the output and the words of a
command as after `python`; for each it writes a line with the exit status.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import traceback
from pathlib import Path


class Forking:
    """Python in a folder whose packages are the ones imported."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, __file__], cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": str(folder)},
        )  # fmt: skip

    def run(self, *words: str) -> str:
        """Run `python WORDS`, and return all that it prints. Raises AssertionError if it fails."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.count += 1
        output = self.folder / f"output_{self.count}.txt"
        print(json.dumps([str(output), *words]), file=self.process.stdin, flush=True)
        status = self.process.stdout.readline().strip()
        assert status == "0", f"exit status {status}: {output.read_text() if output.exists() else words}"
        return output.read_text()

    def close(self) -> None:
        self.process.communicate("")


def run_here(output: str, words: list[str]) -> int:
    """Do what `python WORDS` does, with its output in a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        if words[0] in ("-m", "-c"):
            sys.argv = words[1:]
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
        output, *words = json.loads(line)
        child = os.fork()
        if child == 0:
            status = run_here(output, words)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=replies, flush=True)


if __name__ == "__main__":
    serve()
