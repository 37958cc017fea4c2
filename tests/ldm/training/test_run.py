"""A run's folder: what is written by whom, which checkpoint is the newest, what the progress line says."""

from __future__ import annotations

import errno
import json
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ldm.errors import DataError, NonFiniteError, Stopped
from ldm.files.checkpoints import Digest
from ldm.training.run import Run, RunConfig, duration


def config(tmp_path: Path, **settings: Any) -> RunConfig:
    return RunConfig(**{"name": "trial", "folder": str(tmp_path), "steps": 100, "log_every": 10} | settings)


def make_run(tmp_path: Path, *, is_main: bool = True, **settings: Any) -> Run:
    run = Run(config(tmp_path, **settings), is_main=is_main)
    run.config_text = "run: {}\n"
    return run


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("ldm.training.run.time.monotonic", clock)
    return clock


def add_checkpoint(run: Run, step: int) -> Path:
    path = run.checkpoints.path(step)
    partial = path.with_name(path.name + ".partial")
    partial.mkdir(parents=True)
    (partial / "state.json").write_text("{}")
    return run.checkpoints.commit(partial, {"state.json": Digest.of(partial / "state.json")})


def test_the_main_rank_makes_the_folder_when_training_begins(tmp_path: Path):
    run = make_run(tmp_path)
    assert not list(tmp_path.iterdir())
    run.begin(None)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "trial",
        "trial/.lock",
        "trial/config.yaml",
        "trial/metrics.jsonl",
        "trial/samples",
    ]
    assert (tmp_path / "trial/config.yaml").read_text() == "run: {}\n"
    assert run.sample_path(50) == tmp_path / "trial/samples/step_0000050.png"
    assert run.checkpoints.all() == []
    assert run.checkpoints.path(50) == tmp_path / "trial/checkpoints/step_0000050"


def test_other_ranks_write_and_say_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path, is_main=False)
    for step in range(1, 101):
        run.log_step(step=step, loss=1.0, lr=1e-3, batch_size=1, samples_seen=step, measures={})
    run.record(step=1)
    run.log("hello")
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_a_run_that_must_not_be_continued_is_refused(tmp_path: Path):
    run = make_run(tmp_path)
    make_run(tmp_path, resume="never")  # no checkpoint yet
    add_checkpoint(run, 100)
    assert make_run(tmp_path).checkpoints.all() == [run.checkpoints.path(100)]
    for is_main in (True, False):
        with pytest.raises(ValueError, match="trial already holds step_0000100: set run.resume=auto"):
            make_run(tmp_path, resume="never", is_main=is_main)


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "trial/metrics.jsonl").read_text().splitlines()]


def test_a_line_every_log_every_steps_and_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path, steps=25)
    run.begin(None)
    for step in range(1, 26):
        run.log_step(step=step, loss=step, lr=1e-3, batch_size=8, samples_seen=8 * step, measures={"kl": step / 7})
    found = records(tmp_path)
    assert [record["step"] for record in found] == [10, 20, 25]
    assert [record["loss"] for record in found] == [5.5, 15.5, 23.0]  # the mean since the line before
    assert [record["samples_seen"] for record in found] == [80, 160, 200]
    assert [record["kl"] for record in found] == pytest.approx([10 / 7, 20 / 7, 25 / 7])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("step 20/25  loss 15.5000  kl 2.857  lr 1.00e-03  ")


def test_what_a_crash_left_after_its_checkpoint_is_not_recorded_twice(tmp_path: Path):
    run = make_run(tmp_path)
    run.begin(None)
    for step in (10, 20, 30):
        run.record(step=step, loss=1.0)
    with run.metrics_path.open("a") as file:
        file.write('{"time": 1.0, "st')  # the crash came while it was written
    (run.checkpoints.folder / "step_0000030.partial").mkdir(parents=True)
    make_run(tmp_path, is_main=False).begin(20)
    assert len(run.metrics_path.read_text().splitlines()) == 4
    run.begin(20)
    run.record(step=30, loss=2.0)
    assert [(record["step"], record["loss"]) for record in records(tmp_path)] == [(10, 1.0), (20, 1.0), (30, 2.0)]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_run_that_begins_anew_forgets_what_came_before_its_first_checkpoint(tmp_path: Path):
    run = make_run(tmp_path)
    run.begin(None)
    run.record(step=0, held_out_loss=1.0)
    run.begin(None)
    assert records(tmp_path) == []


def test_whether_a_step_was_sampled(tmp_path: Path):
    run = make_run(tmp_path)
    assert not run.has_sample(10)
    run.begin(None)
    run.record(step=10, loss=1.0)
    assert not run.has_sample(10)
    run.record(step=10, held_out_loss=1.0)
    assert run.has_sample(10) and not run.has_sample(20)


def test_a_folder_is_one_process_own(tmp_path: Path):
    make_run(tmp_path).lock()  # nothing there yet, nothing to keep
    first, second = make_run(tmp_path), make_run(tmp_path)
    first.begin(None)
    first.lock()
    make_run(tmp_path, is_main=False).begin(None)
    for attempt in (second.lock, lambda: second.begin(None)):
        with pytest.raises(ValueError, match=rf"process {os.getpid()} on .* is training in .*trial: wait for it"):
            attempt()


def test_where_nothing_can_be_locked_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def flock(*_arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    run = make_run(tmp_path)
    run.begin(None)
    run.lock()
    assert capsys.readouterr().out.count("trial cannot be locked ([Errno 37] No locks available)") == 1


def test_speed_and_time_left(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path)
    run.begin(None)
    for step in range(1, 31):
        clock.now += 2.0 if step <= 10 else 0.5
        run.log_step(step=step, loss=1.0, lr=1e-3, batch_size=8, samples_seen=8 * step, measures={})
    assert [record["images_per_second"] for record in records(tmp_path)] == pytest.approx([4.0, 16.0, 16.0])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("4.0 images/s  ETA 0:03:00")  # 90 steps of 2 s
    assert lines[2].endswith("16.0 images/s  ETA 0:01:10")  # 70 steps of 1 s, the mean of these lines


def test_what_happens_between_the_steps_is_not_counted(tmp_path: Path, clock: Clock):
    run = make_run(tmp_path)
    run.begin(None)
    clock.now += 1000.0  # loading
    run.restart_clock()
    for step in range(1, 21):
        clock.now += 2.0
        run.log_step(step=step, loss=1.0, lr=1e-3, batch_size=8, samples_seen=8 * step, measures={})
        if step == 14:
            clock.now += 500.0  # drawing
            run.restart_clock()
    assert [record["images_per_second"] for record in records(tmp_path)] == pytest.approx([4.0, 4.0])


def test_speed_after_resuming_counts_this_session_alone(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
):
    run = make_run(tmp_path)
    run.begin(None)
    for step in range(86, 101):  # 85 steps were taken in another session
        clock.now += 2.0
        run.log_step(step=step, loss=1.0, lr=1e-3, batch_size=8, samples_seen=8 * step, measures={})
    assert [record["images_per_second"] for record in records(tmp_path)] == pytest.approx([4.0, 4.0])
    assert capsys.readouterr().out.splitlines()[0].endswith("4.0 images/s  ETA 0:00:20")


def test_the_share_of_time_that_went_into_waiting_for_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Always recorded, and logged if it is not negligible."""
    run = make_run(tmp_path)
    run.begin(None)
    for step, share in ((10, 0.01), (20, 0.25)):
        run.log_step(step=step, loss=1.0, lr=1e-3, batch_size=8, samples_seen=8 * step, measures={"data_wait": share})
    assert [record["data_wait"] for record in records(tmp_path)] == [0.01, 0.25]
    lines = capsys.readouterr().out.splitlines()
    assert "waiting" not in lines[0] and "  waiting for data 25%  " in lines[1]


def test_a_skipped_batch_is_written_down_by_each_rank(tmp_path: Path):
    run = make_run(tmp_path)
    run.begin(None)
    for rank in (0, 1):
        path = run.skipped(rank, step=3, position=5, fault="the loss is nan", keys=["0.tar:7"])
    assert path == tmp_path / "trial/skipped/rank_00001.jsonl"
    expected = {"step": 3, "batch": 5, "fault": "the loss is nan", "samples": ["0.tar:7"]}
    assert [json.loads(line) for line in path.read_text().splitlines()] == [expected]


def test_records_are_appended(tmp_path: Path):
    make_run(tmp_path).begin(None)
    make_run(tmp_path).record(step=1, psnr=20.5)
    make_run(tmp_path).record(step=2)
    found = records(tmp_path)
    assert [set(record) for record in found] == [{"time", "step", "psnr"}, {"time", "step"}]
    assert found[0]["psnr"] == 20.5


def test_time_runs_out(tmp_path: Path, clock: Clock):
    endless, short = make_run(tmp_path), make_run(tmp_path, minutes=1.5)
    clock.now += 89.0
    assert not short.out_of_time
    clock.now += 2.0
    assert short.out_of_time and not endless.out_of_time


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "0:00:00"), (59.4, "0:00:59"), (59.6, "0:01:00"), (3661, "1:01:01"), (360000, "100:00:00")],
)
def test_duration(seconds: float, expected: str):
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"steps": 0}, "run.steps must be at least 1, not 0"),
        ({"log_every": 0}, "run.log_every"),
        ({"sample_every": -1}, "run.sample_every"),
        ({"checkpoint_every": 0}, "run.checkpoint_every"),
        ({"name": ""}, "the name of a single folder, not ''"),
        ({"name": "a/b"}, "the name of a single folder, not 'a/b'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path: Path, settings: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        config(tmp_path, **settings)


def test_a_configuration_of_the_users_in_the_runs_folder_is_not_overwritten(tmp_path: Path):
    run = make_run(tmp_path)
    (tmp_path / "trial").mkdir()
    mine = tmp_path / "trial" / "config.yaml"
    mine.write_text("# my comments\n")
    with pytest.raises(ValueError, match=r"trial/config.yaml is not a run's, and would be overwritten: move"):
        run.begin(None)
    assert [path.name for path in (tmp_path / "trial").iterdir()] == ["config.yaml"]
    mine.rename(tmp_path / "mine.yaml")
    run.begin(None)
    run.begin(None)  # it had begun, and was killed before its first checkpoint
    assert mine.read_text() == "run: {}\n"


def test_what_is_for_show_ends_nothing_and_what_is_not_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path)

    def fail_by(error: BaseException) -> None:
        raise error

    for error, said in (
        (OSError(errno.EIO, "Input/output error"), "[Errno 5] Input/output error"),
        (OverflowError("too large"), "OverflowError: too large"),
        (struct.error("odd"), "error: odd"),
        (zipfile.BadZipFile("File is not a zip file"), "BadZipFile: File is not a zip file"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory"),
    ):
        assert run.written("the sheet", lambda error=error: fail_by(error)) is False
        assert capsys.readouterr().out == f"the sheet could not be written ({said}): training goes on without\n"
    for error in (NonFiniteError("x"), DataError("x"), Stopped(), RuntimeError("[gloo] connection closed by peer")):
        with pytest.raises(type(error)):
            run.written("the sheet", lambda error=error: fail_by(error))
    assert run.written("the sheet", lambda: None) is True


def test_a_sample_counts_only_if_it_was_written(tmp_path: Path):
    run = make_run(tmp_path)
    run.begin(None)
    run.record(step=2, held_out_loss=1.0, written=False)
    run.record(step=4, held_out_loss=1.0)
    assert [run.has_sample(step) for step in (2, 4)] == [False, True]
