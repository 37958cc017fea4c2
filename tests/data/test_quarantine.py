"""The list of bad samples: one line each, once, never two ranks in one file."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from data.bad_samples import BadSample, Quarantine

BAD = BadSample("00000.tar", "000000001", "no caption")


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_bad_sample_is_a_line_once_even_over_a_resume(tmp_path: Path):
    path = tmp_path / "bad_samples.jsonl"
    first = Quarantine(path)
    assert not path.exists()
    first.add(BAD)
    first.add(BAD)
    Quarantine(path).add(BAD)
    Quarantine(path).add(BadSample("00000.tar", "é\udcff\n", "no caption"))
    assert lines(path) == [
        {"shard": "00000.tar", "key": "000000001", "reason": "no caption"},
        {"shard": "00000.tar", "key": "é\udcff\n", "reason": "no caption"},
    ]


def test_ranks_write_files_of_their_own(tmp_path: Path):
    for rank in (0, 3):
        Quarantine(tmp_path / "bad_samples.jsonl", rank=rank).add(BAD)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad_samples.jsonl", "bad_samples.rank3.jsonl"]


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path):
    path = tmp_path / "bad_samples.jsonl"
    path.write_text('{"shard": "0000')
    Quarantine(path).add(BAD)
    assert path.read_text().splitlines()[1] == json.dumps(lines_of(BAD))


def lines_of(bad: BadSample) -> dict[str, str]:
    return {"shard": bad.shard, "key": bad.key, "reason": bad.reason}


def test_threads_write_whole_lines(tmp_path: Path):
    quarantine = Quarantine(tmp_path / "bad_samples.jsonl")

    def work(thread: int) -> None:
        for number in range(50):
            quarantine.add(BadSample("0.tar", f"{thread}-{number}", "x" * 500))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({line["key"] for line in lines(quarantine.path)}) == 200


def test_a_file_that_cannot_be_written_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Quarantine(tmp_path / "no folder" / "bad_samples.jsonl").add(BAD)
    told = capsys.readouterr().out
    assert "cannot be written" in told and "000000001 in 00000.tar: no caption" in told


def test_what_is_printed_cannot_command_a_terminal():
    bad = BadSample("0.tar", "a\x1b[31m\nb\u202e\udc80", "no caption")
    assert str(bad) == "a\\x1b[31m\\nb\\u202e\\udc80 in 0.tar: no caption"


def test_what_is_printed_is_never_very_long():
    assert len(str(BadSample("0.tar", "k" * 10**6, "no caption"))) == 1003
