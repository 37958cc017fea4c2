"""What a single file says of itself to other programs, and what it cannot hold or replace."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml
from helpers.stable_diffusion import UNETS, stable_diffusion
from safetensors import safe_open
from safetensors.torch import save_file

from ldm.diffusion import CosinePath, ScaledLinearBetaPath
from ldm.interop.compvis.reading import read_single_file
from ldm.interop.compvis.writing import write_single_file
from ldm.interop.weight_reader import open_weights

FP32: dict[str, Any] = {"dtype": torch.float32}


def test_zero_terminal_snr_is_told_to_others_by_its_mark(tmp_path):
    path = ScaledLinearBetaPath(zero_terminal_snr=True)
    write_single_file(stable_diffusion(2, prediction="v", path=path), tmp_path / "m.safetensors", **FP32)
    tensors = {name: tensor.clone() for name, tensor in open_weights(tmp_path / "m.safetensors").tensors.items()}
    assert tensors["v_pred"].numel() == tensors["ztsnr"].numel() == 0
    (tmp_path / "m.yaml").unlink()
    save_file(tensors, tmp_path / "m.safetensors")
    found = read_single_file(tmp_path / "m.safetensors", **FP32)
    assert (found.model.path, found.model.prediction) == (path, "v")


def test_the_header_is_what_other_programs_ask_for(tmp_path):
    path = tmp_path / "my-model.safetensors"
    write_single_file(stable_diffusion(2, prediction="v"), path, dtype=torch.float16)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header["format"] == "pt"
    assert header["modelspec.sai_model_spec"] == "1.0.1"
    assert header["modelspec.title"] == "my-model"
    assert (header["modelspec.prediction_type"], header["modelspec.resolution"]) == ("v", "32x32")
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    assert header["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data).hexdigest()
    assert {tensor.dtype for tensor in open_weights(path).tensors.values()} == {torch.float16}
    assert json.loads(header["foundry"])["unet"]["_class_name"] == "UNet2DConditionModel"


def test_the_yaml_beside_it_describes_the_network(tmp_path):
    write_single_file(stable_diffusion(2, prediction="v", inpainting=True), tmp_path / "m.safetensors", **FP32)
    params = yaml.safe_load((tmp_path / "m.yaml").read_text())["model"]["params"]
    unet = params["unet_config"]["params"]
    config = UNETS[2]
    assert [unet["model_channels"] * mult for mult in unet["channel_mult"]] == list(config.block_out_channels)
    assert (unet["num_res_blocks"], unet["num_head_channels"], unet["attention_resolutions"]) == (2, 64, [1, 2])
    assert (unet["in_channels"], unet["context_dim"], unet["use_linear_in_transformer"]) == (9, 64, True)
    assert (params["parameterization"], params["scale_factor"]) == ("v", 0.18215)
    assert params["conditioning_key"] == "hybrid"
    # Without the header, it tells all that the shapes do not.
    tensors = {name: tensor.clone() for name, tensor in open_weights(tmp_path / "m.safetensors").tensors.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    assert read_single_file(tmp_path / "m.safetensors", **FP32).model.prediction == "v"


@pytest.mark.parametrize(
    ("parts", "name", "message"),
    [
        ({"transformer": True}, "m.safetensors", "a DiT has no single-file layout"),
        ({"path": CosinePath()}, "m.safetensors", "a single file cannot express eps on path cosine"),
        ({"prediction": "x0"}, "m.safetensors", "cannot express x0 on path scaled_linear_beta"),
        ({"wide": True}, "m.safetensors", r"the U-Net's widths \(64, 96\) are not multiples of the first"),
        ({}, "m.ckpt", "m.ckpt does not end in .safetensors"),
        ({}, "taken.safetensors", "taken.safetensors exists and is not an export of this program"),
        ({}, "letter.safetensors", "letter.yaml exists and is not an export of this program"),
    ],
)
def test_what_a_single_file_cannot_hold_or_replace(parts, name, message, tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "taken.safetensors")
    (tmp_path / "letter.yaml").write_text("dear: reader")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    model = stable_diffusion(1, **{key: value for key, value in parts.items() if key != "wide"})
    if "wide" in parts:
        model = replace(model, config=replace(UNETS[1], block_out_channels=(64, 96)))
    with pytest.raises(ValueError, match=message):
        write_single_file(model, tmp_path / name, **FP32)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_older_export_is_replaced(tmp_path):
    write_single_file(stable_diffusion(1), tmp_path / "m.safetensors", **FP32)
    write_single_file(stable_diffusion(2), tmp_path / "m.safetensors", **FP32)
    assert read_single_file(tmp_path / "m.safetensors", **FP32).config == UNETS[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "m.yaml"]
