"""Options for prompts on the command line."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from ldm.inference.options import DrawOptions


def test_embeddings_folders_and_clip_skip(command, model):
    Path("loras").mkdir()
    for name in ("a.pt", "b=c.pt"):
        Path(name).touch()
    words = ["--embedding", "a.pt", "--embedding=mine=a.pt", "--embedding", "b=c.pt", "--lora-folder", "loras"]
    assert command("--prompt", "x", *words, "--clip-skip", "2")[0] == 0
    assert model.about["embeddings"] == [(Path("a.pt"), ""), (Path("a.pt"), "mine"), (Path("b=c.pt"), "")]
    assert model.about["lora_folders"] == [Path("loras")]
    assert model.calls[0]["options"] == DrawOptions(clip_skip=2)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--embedding", "nowhere.pt"], "--embedding is nowhere.pt, which does not exist"),
        (["--embedding", "=a.pt"], "the embedding is '=a.pt', expected a file or a folder, or NAME=FILE"),
        (["--lora-folder", "nowhere"], "--lora-folder is nowhere, which is not a folder"),
        (["--clip-skip", "0"], "clip skip is 0, expected 1 to 256"),
    ],
)
def test_mistakes_are_one_line(command, words, told):
    code, _, err = command("--prompt", "x", *words)
    assert code == 2 and len(err.splitlines()) == 1 and told in err


def test_a_warning_is_one_line(command, model, monkeypatch):
    def check(own, request):
        warnings.warn("the prompt has\n[a|b]", stacklevel=2)
        return request.check(own.facts)

    monkeypatch.setattr(model, "check", check)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, err = command("--prompt", "x", "--prompt", "y")
    assert (code, err) == (0, "warning: the prompt has [a|b]\n")
