"""What an error becomes: one line, an exit code, and said by whom."""

import argparse
import json
import sys
import warnings

import pytest

from ldm.cli import OneLineParser, hyphenated, run_command, training_arguments, warnings_in_one_line
from ldm.errors import IN_TRAINING, CheckpointError, DataError, NonFiniteError, PeerError, Stopped
from ldm.training.checkpoints.saver import NonFiniteStateError


def fail(error: Exception, *, note: str = "") -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--debug", action="store_true")
    if note:
        error.add_note(note)

    def main(args: argparse.Namespace) -> None:
        raise error

    return run_command(main, parser, [])


CODES = [
    (ValueError("x is 1,\n expected 2"), 2),
    (OSError("no space left"), 2),
    (DataError("shard"), 3),
    (CheckpointError("cut"), 4),
    (NonFiniteError("nan"), 6),
    (NonFiniteStateError("the weights"), 6),
]


@pytest.mark.parametrize(("error", "code"), CODES, ids=lambda value: type(value).__name__)
def test_a_mistake_is_one_line_and_a_code(error, code, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    assert fail(error) == code
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"


def test_a_fault_of_ours_shows_where_it_is():
    with pytest.raises(IndexError):
        fail(IndexError("ours"))


@pytest.mark.parametrize(("error", "code"), CODES, ids=lambda value: type(value).__name__)
def test_what_all_ranks_meet_is_said_once(error, code, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert fail(error) == code
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("error", [OSError("no space left"), DataError("shard 7 can no longer be read")])
def test_what_one_rank_may_meet_alone_is_said_by_it(error, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    fail(error, note=f"{IN_TRAINING}, rank 1, step 70")
    assert capsys.readouterr().err == f"error: rank 1: {error}\n"


@pytest.mark.parametrize(("rank", "said"), [("0", "warning: a file has a tail\n"), ("1", "")])
def test_a_warning_is_said_once_by_a_machines_first_rank(rank, said, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with warnings_in_one_line():
        for _ in range(2):
            warnings.warn("a file\nhas a tail", stacklevel=2)
    assert capsys.readouterr().err == said


def test_hyphenated_leaves_values_alone():
    words = ["--n_samples", "a_b", "--from_file=a_b", "--a_b c_d", "-a_b", "--", "--_x"]
    assert hyphenated(words) == ["--n-samples", "a_b", "--from-file=a_b", "--a_b c_d", "-a_b", "--", "--_x"]


def test_training_commands_parse_and_fail_as_before(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "c.yaml", "run.steps=3", "--local_rank=1"])

    def fail(args):
        raise FileNotFoundError(json.dumps([args.config, args.overrides, args.local_rank]))

    assert run_command(fail, training_arguments("x")) == 2
    assert capsys.readouterr().err == 'error: ["c.yaml", ["run.steps=3"], 1]\n'

    def bug(args):
        raise TypeError("ours")

    with pytest.raises(TypeError):
        run_command(bug, training_arguments("x"))


def test_options_are_not_abbreviated(capsys):
    parser = OneLineParser("x")
    parser.add_argument("--outdir", "--output")
    with pytest.raises(SystemExit):
        parser.parse_args(["--outd", "x"])
    assert capsys.readouterr().err == "error: unknown option --outd, did you mean --outdir?\n"


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (PeerError("rank 1 died"), "rank 1 died"),
        (
            RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:7"),
            "another rank ended: [gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:7",
        ),
    ],
)
def test_the_end_of_another_rank_is_said_by_every_rank(error, told, rank, capsys, monkeypatch):
    """Rank 0, which speaks for all otherwise, may be the one that ended."""
    monkeypatch.setenv("RANK", rank)
    assert fail(error) == 5
    assert capsys.readouterr().err == f"error: {'' if rank == '0' else 'rank 1: '}{told}\n"


def test_another_runtime_error_is_a_fault_of_ours():
    with pytest.raises(RuntimeError):
        fail(RuntimeError("shapes differ"))


def test_a_signal_before_training_is_no_error(capsys):
    def main(args: argparse.Namespace) -> None:
        raise Stopped

    assert run_command(main, argparse.ArgumentParser(), []) == 0
    assert capsys.readouterr().out == "stopped by a signal outside of training: nothing is lost\n"
