"""A folder that one process at a time works in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.files.atomic import LOCK, Taken, lock_folder


def test_the_owner_is_named_and_a_folder_that_was_left_is_free(tmp_path: Path):
    lock = lock_folder(tmp_path)
    with pytest.raises(Taken, match=rf"^process {os.getpid()} on \S+$"):
        lock_folder(tmp_path)
    os.close(lock)
    os.close(lock_folder(tmp_path))


def test_an_owner_that_has_not_yet_told_its_name_is_another_process(tmp_path: Path):
    lock = lock_folder(tmp_path)
    (tmp_path / LOCK).write_text("")
    with pytest.raises(Taken, match="^another process$"):
        lock_folder(tmp_path)
    os.close(lock)


def test_a_killed_process_keeps_nothing(tmp_path: Path):
    script = (
        "import sys; from pathlib import Path; from ldm.files.atomic import lock_folder; "
        f"lock_folder(Path({str(tmp_path)!r}))"
    )
    script += "; print('kept', flush=True); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        text=True,
        cwd=Path(__file__).parents[3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "kept\n"
        with pytest.raises(Taken, match=rf"^process {process.pid} on "):
            lock_folder(tmp_path)
        process.send_signal(signal.SIGKILL)
    os.close(lock_folder(tmp_path))
    assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()
