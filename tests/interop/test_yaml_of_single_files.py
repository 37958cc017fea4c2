"""The YAML beside a single file builds in CompVis's and Stability's own classes; the file fills what they build."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.compvis_classes import COMPVIS, STABILITY, problems
from helpers.stable_diffusion import TEXTS, stable_diffusion, states, stirred

from ldm.interop.compvis.reading import read_single_file
from ldm.interop.compvis.sidecar import read_sidecar
from ldm.interop.compvis.writing import write_single_file
from ldm.interop.diffusers_layout.folder import read_folder, write_folder
from ldm.interop.weight_reader import open_weights
from ldm.model.components import ModelComponents
from ldm.model.conditioner import Conditioner, TextTower
from text.encoder import TextEncoderConfig, TransformersTextEncoder
from text.tokenizer import Tokenizer

FP32: dict[str, Any] = {"dtype": torch.float32}
VERSIONS: dict[str, dict[str, Any]] = {
    "1": {"version": 1},
    "1-v": {"version": 1, "prediction": "v"},
    "1-inpainting": {"version": 1, "inpainting": True},
    "2": {"version": 2},
    "2-v": {"version": 2, "prediction": "v"},
}
LAST = "cond_stage_model.model.transformer.resblocks.{}.{}"


def written(parts: ModelComponents, folder: Path) -> dict[str, Any]:
    write_single_file(parts, folder / "m.safetensors", **FP32)
    return yaml.safe_load((folder / "m.yaml").read_text())["model"]


@pytest.mark.parametrize("name", VERSIONS)
def test_it_builds_in_the_classes_that_it_names(name, tmp_path):
    config = written(stable_diffusion(**VERSIONS[name]), tmp_path)
    assert list(problems(config, STABILITY)) == []
    # CompVis's own code is of version 1 alone, without inpainting and v.
    other = {
        "1": [],
        "1-v": ["LatentDiffusion: parameterization is one of eps, x0"],
        "1-inpainting": ["no ldm.models.diffusion.ddpm.LatentInpaintDiffusion"],
    }
    assert name not in other or list(problems(config, COMPVIS)) == other[name]


@pytest.mark.parametrize("name", VERSIONS)
def test_our_own_reader_takes_it(name, tmp_path):
    config = written(stable_diffusion(**VERSIONS[name]), tmp_path)
    found = read_sidecar(tmp_path / "m.safetensors", {})
    assert found.prediction == VERSIONS[name].get("prediction", "eps")
    unet = config["params"]["unet_config"]["params"]
    assert (found.heads, found.head_width) == (unet.get("num_heads"), unet.get("num_head_channels"))
    assert (found.scale_factor, found.timesteps) == (0.18215, 1000)


def test_the_check_finds_what_was_wrong_in_earlier_ones(tmp_path):
    """The keys that CompVis's U-Net does not take, and an inpainting model that has to be extended from a file."""
    inpainting = written(stable_diffusion(1, inpainting=True), tmp_path)
    del inpainting["params"]["finetune_keys"]
    assert list(problems(inpainting, STABILITY)) == ["LatentInpaintDiffusion: finetune_keys need a ckpt_path"]
    plain = written(stable_diffusion(1), tmp_path)
    plain["params"]["unet_config"]["params"]["use_linear_in_transformer"] = False
    assert list(problems(plain, COMPVIS)) == ["UNetModel does not take use_linear_in_transformer"]
    del plain["params"]["timesteps"], plain["params"]["unet_config"]["params"]["num_heads"]
    assert "LatentDiffusion needs timesteps" in list(problems(plain, STABILITY))
    assert "UNetModel: either num_heads or num_head_channels" in list(problems(plain, STABILITY))


# The text encoder of Stable Diffusion 2: 24 layers, of which the last is not used, and diffusers' folders lack it.


def as_in_a_folder() -> ModelComponents:
    """Stable Diffusion 2 with 23 layers of text, as its folder in diffusers' layout has."""
    parts = stable_diffusion(2, prediction="v")
    config: TextEncoderConfig = replace(TEXTS[2], layers=23, hidden="last")
    encoder = stirred(TransformersTextEncoder(config), by=0.05, seed=2)
    conditioner = Conditioner(TextTower(encoder, Tokenizer(config.tokenizer)))
    return replace(parts, model=replace(parts.model, conditioner=conditioner))


def test_a_tower_without_its_last_layer_gets_one_that_is_not_used(tmp_path):
    parts = as_in_a_folder()
    config = written(parts, tmp_path)
    tensors = open_weights(tmp_path / "m.safetensors").tensors
    layers = {name.split(".")[4] for name in tensors if name.startswith(LAST.format("", "").rpartition("..")[0] + ".")}
    assert layers == {str(i) for i in range(24)}
    for name in ("attn.in_proj_weight", "mlp.c_proj.bias", "ln_2.weight"):
        assert torch.equal(tensors[LAST.format(23, name)], tensors[LAST.format(22, name)])
    # Otherwise Stability's class would use that layer, too.
    assert config["params"]["cond_stage_config"]["params"]["layer"] == "penultimate"
    for header in (True, False):
        if not header:  # as other programs write it: the shapes alone tell
            from safetensors.torch import save_file

            save_file({name: t.clone() for name, t in tensors.items()}, tmp_path / "m.safetensors")
        found = read_single_file(tmp_path / "m.safetensors", **FP32)
        assert found.model.conditioner.encoders[0].config.layers == (23 if header else 24)
        prompts = ["a frog", ""]
        ours, theirs = (model.model.conditioner(prompts).context for model in (parts, found))
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_a_folder_and_a_single_file_turn_into_each_other_without_a_change(tmp_path):
    first, second = (tmp_path / name for name in ("first", "second"))
    write_folder(as_in_a_folder(), first, **FP32)
    files = []
    for source, name in ((first, "a"), (second, "b")):
        write_single_file(read_folder(source, **FP32), tmp_path / f"{name}.safetensors", **FP32)
        files.append((tmp_path / f"{name}.safetensors").read_bytes())
        if name == "a":
            write_folder(read_single_file(tmp_path / "a.safetensors", **FP32), second, **FP32)
    data = [content[8 + int.from_bytes(content[:8], "little") :] for content in files]
    assert data[0] == data[1]
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert (first / f"{part}.safetensors").read_bytes() == (second / f"{part}.safetensors").read_bytes()


def test_a_tower_that_has_its_last_layer_keeps_it(tmp_path):
    parts = stable_diffusion(2)
    config = written(parts, tmp_path)
    assert config["params"]["cond_stage_config"]["params"]["layer"] == "penultimate"
    found = read_single_file(tmp_path / "m.safetensors", **FP32)
    assert all(torch.equal(tensor, states(found)[name]) for name, tensor in states(parts).items())
