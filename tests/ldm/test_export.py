"""What an export may replace, and what it carries."""

import shutil

import pytest
import torch

from ldm import TextToImage
from ldm.commands import run_command
from ldm.export import arguments, main


def export_command(*words: str) -> int:
    return run_command(main, arguments(), words)


def test_an_export_draws_the_same_in_half_the_size(dit_folder, tmp_path):
    assert export_command(str(dit_folder), str(tmp_path / "half")) == 0
    files = [folder / "transformer/diffusion_pytorch_model.safetensors" for folder in (dit_folder, tmp_path / "half")]
    assert files[1].stat().st_size < 0.6 * files[0].stat().st_size
    settings = {"negative_prompt": "", "steps": 3, "scale": 3.0, "sampler": "euler", "seed": 1}
    pipes = [TextToImage.load(folder, device="cpu", dtype="fp32") for folder in (dit_folder, tmp_path / "half")]
    assert pipes[0].native_size == pipes[1].native_size == 16
    torch.testing.assert_close(*(pipe.draw(["x"], **settings) for pipe in pipes), atol=0.02, rtol=0)


def test_an_older_export_is_replaced_and_nothing_else_ever(dit_folder, unet_folder, tmp_path, capsys):
    target = shutil.copytree(unet_folder, tmp_path / "model")
    assert export_command(str(dit_folder), str(target)) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert not (target / "unet").exists()
    diary = tmp_path / "diary"
    diary.mkdir()
    (diary / "monday.txt").write_text("rain")
    assert export_command(str(dit_folder), str(diary)) == 2
    assert (diary / "monday.txt").read_text() == "rain"
    assert "diary exists and is not a model" in capsys.readouterr().err


def test_the_notes_of_a_runs_model_are_carried_along(dit_folder, tmp_path):
    shutil.copytree(dit_folder, tmp_path / "run" / "model")
    assert export_command(str(tmp_path / "run"), str(tmp_path / "out")) == 0
    assert (tmp_path / "out" / "foundry.yaml").read_text() == "run: {name: tiny}\n"


@pytest.mark.parametrize("words", [["nowhere", "out"], ["only-one"]])
def test_a_mistake_is_one_line(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = export_command(*words)
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
