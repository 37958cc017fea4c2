"""An export is the model that it was written from: one source for padding, prediction, path, scale and layer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stable_diffusion import Version, stable_diffusion

from ldm import DrawRequest, TextToImage
from ldm.cli import run_command
from ldm.diffusion import ScaledLinearBetaPath
from ldm.export import arguments, main
from ldm.interop.compvis.writing import write_single_file
from ldm.interop.diffusers_layout.folder import write_folder
from ldm.interop.read_back import PROMPTS, TOLERANCES, check_written, difference
from ldm.interop.read_model import read_model
from ldm.model.components import ModelComponents
from ldm.model.conditioner import Conditioner, TextTower
from text import Tokenizer, TransformersTextEncoder

# The special tokens of every published text_encoder/config.json of Stable Diffusion, which its tokenizer does not use.
PUBLISHED_IDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def published(folder: Path, version: Version, **more: Any) -> Path:
    """A folder of Stable Diffusion in miniature, whose text encoder states the published ids."""
    write_folder(stable_diffusion(version, **more), folder, dtype=torch.float32)
    file = folder / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | PUBLISHED_IDS))
    return folder


def export(*words: object) -> None:
    assert run_command(main, arguments(), [str(word) for word in words]) == 0


def picture(path: Path, prompt: str) -> torch.Tensor:
    request = DrawRequest(prompt=prompt, steps=3, scale=3.0, sampler="euler", seed=1)
    return TextToImage.load(path, device="cpu", dtype="fp32").pixels(request)


@pytest.mark.parametrize(("version", "pad_id"), [(1, 49407), (2, 0)])
def test_a_folders_padding_is_its_tokenizers_in_every_layout(tmp_path: Path, version: Version, pad_id: int):
    folder, file, again = published(tmp_path / "a", version), tmp_path / "b.safetensors", tmp_path / "c"
    export(folder, file, "--format", "single-file")
    export(file, again)
    for path in (folder, file, again):
        (tower,) = read_model(path, dtype=torch.float32).model.conditioner.towers
        assert tower.tokenizer.config.pad_id == tower.encoder.config.pad_id == pad_id
        assert tower.tokenizer(["x"])[0].tolist() == [49406, 343, 49407, *[pad_id] * 74]
        torch.testing.assert_close(picture(path, "a cat!"), picture(folder, "a cat!"), atol=1e-6, rtol=0)
    stated = json.loads((again / "text_encoder" / "config.json").read_text())
    assert {key: stated[key] for key in PUBLISHED_IDS} == {
        "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": pad_id,
    }  # fmt: skip


def changed_text(parts: ModelComponents, **changes: Any) -> ModelComponents:
    (tower,) = parts.model.conditioner.towers
    encoder = TransformersTextEncoder(replace(tower.encoder.config, **changes)).eval()
    encoder.load_state_dict(tower.encoder.state_dict())
    other = Conditioner(TextTower(encoder, Tokenizer(encoder.config.tokenizer)))
    return replace(parts, model=replace(parts.model, conditioner=other))


def scaled(parts: ModelComponents) -> ModelComponents:
    parts.model.vae.config = replace(parts.model.vae.config, latent_std=(1 / 0.13025,) * 4)
    return parts


def stirred_weight(parts: ModelComponents) -> ModelComponents:
    weight = next(parts.denoiser.parameters())
    weight.view(-1)[0] += 0.5
    return parts


WRONG: dict[str, tuple[Callable[[ModelComponents], ModelComponents], str]] = {
    "padding": (lambda parts: changed_text(parts, pad_id=7), "prompts have other token ids"),
    "layer": (lambda parts: changed_text(parts, hidden="penultimate"), "the denoiser's output differs by "),
    "activation": (lambda parts: changed_text(parts, activation="gelu"), "the denoiser's output differs by "),
    "prediction": (lambda p: replace(p, model=replace(p.model, prediction="v")), "it predicts v on "),
    "path": (lambda p: replace(p, model=replace(p.model, path=ScaledLinearBetaPath(beta_end=0.02))), "beta_end=0.02"),
    "size": (lambda parts: replace(parts, sample_size=16), "for latents of 16 a side"),
    "scale": (scaled, "the autoencoder's output differs by "),
    "a weight": (stirred_weight, "the denoiser's output differs by "),
}


@pytest.mark.parametrize("what", WRONG)
def test_every_difference_is_found(what: str):
    change, message = WRONG[what]
    assert message in difference(stable_diffusion(1), change(stable_diffusion(1)), TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("kind", [{"version": 1}, {"version": 2, "prediction": "v"}, {"inpainting": True},
                                  {"transformer": True}])  # fmt: skip
def test_rounding_is_no_difference(tmp_path: Path, dtype: torch.dtype, kind: dict[str, Any]):
    parts = stable_diffusion(**kind)
    write_folder(parts, tmp_path / "a", dtype=dtype, check=lambda path: check_written(parts, path, dtype=dtype))
    found = read_model(tmp_path / "a", dtype=torch.float32)
    assert not difference(parts, found, TOLERANCES[dtype] / 3), "the tolerance is too narrow to be safe"


def test_a_wrong_export_takes_no_name_and_replaces_none(tmp_path: Path):
    right, wrong = stable_diffusion(1), WRONG["path"][0](stable_diffusion(1))
    targets = {tmp_path / "a": write_folder, tmp_path / "b.safetensors": write_single_file}
    for target, write in targets.items():
        write(right, target, dtype=torch.float32)
        before = sorted(tmp_path.rglob("*"))
        message = r"the export was read back, and is another model \(it predicts eps on .*\): nothing was written"
        with pytest.raises(ValueError, match=message):
            write(wrong, target, dtype=torch.float32, check=partial(check_written, right, dtype=torch.float32))
        assert sorted(tmp_path.rglob("*")) == before
        assert read_model(target, dtype=torch.float32).model.path == right.model.path


def test_a_tokenizer_of_another_model_is_refused():
    (tower,) = stable_diffusion(2).model.conditioner.towers
    other = Tokenizer(replace(tower.encoder.config.tokenizer, pad_id=49407))
    with pytest.raises(ValueError, match="pads them with 49407, the text encoder with 49407 and 0: give a text enc"):
        Conditioner(TextTower(tower.encoder, other))


def test_prompts_of_the_comparison_reach_its_corners():
    ids = Tokenizer(stable_diffusion(2).model.conditioner.encoders[0].config.tokenizer)(PROMPTS)
    assert (ids[0] == 0).sum() == 75 and ids[1].tolist().count(0) > 60 and not (ids[2] == 0).any()
