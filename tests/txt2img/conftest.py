"""The command `txt2img.py`, with a model that paints instead of drawing."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from helpers.painting import FakeTextToImage

from ldm.cli import hyphenated, run_command

SCRIPT = Path(__file__).parents[2] / "txt2img.py"


@pytest.fixture(scope="module")
def txt2img():
    spec = importlib.util.spec_from_file_location("txt2img_under_test", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model(monkeypatch, tmp_path):
    """The fake model's class, in the place of the real one; and a folder to work in, with a model path."""
    fake = type("TextToImage", (FakeTextToImage,), {"loads": [], "calls": []})
    monkeypatch.setattr("ldm.inference.pipeline.TextToImage", fake)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "broken").mkdir()
    return fake


@pytest.fixture
def command(txt2img, model, capsys):
    """Runs the command with these words; returns (exit code, stdout, stderr)."""

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = run_command(txt2img.main, txt2img.build_parser(), hyphenated(["--ckpt=model", *words]))
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capsys.readouterr()

    return run
