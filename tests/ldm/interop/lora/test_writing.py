"""LoRA files for other programs, bit by bit, alpha kept."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.loras import (
    FC1,
    PLACES,
    TO_K,
    Model,
    layer,
    merge,
    mixed_layers,
    read_file,
    same,
    some_layers,
)
from safetensors import safe_open
from torch import Tensor

from ldm.interop.lora import LoraLayer, write_lora_diffusers, write_lora_kohya


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kohyas_form_passes_through_bit_for_bit(dtype: torch.dtype, unet: Model, tmp_path: Path):
    layers = [LoraLayer(a.part, a.name, a.down.to(dtype), a.up.to(dtype), a.alpha) for a in mixed_layers(unet)]
    write_lora_kohya(layers, tmp_path / "one.safetensors")
    again = read_file(unet, tmp_path / "one.safetensors")
    assert same(again, layers)
    write_lora_kohya(again, tmp_path / "two.safetensors")
    (first, said), (second, said_again) = contents(tmp_path / "one.safetensors"), contents(tmp_path / "two.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert said == said_again == {"format": "pt", "ss_network_module": "networks.lora"}
    down = first["lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight"]
    assert torch.equal(down, layers[-2].down) and down.dtype == dtype
    assert first["lora_unet_down_blocks_0_resnets_0_conv1.alpha"].item() == 16.0


def test_kohyas_metadata_tells_rank_and_alpha_if_there_is_one(unet: Model, tmp_path: Path):
    extra = {"ss_base_model_version": "sd_v1", "ss_network_module": "lycoris.kohya"}
    write_lora_kohya(some_layers(unet, rank=2, alpha=1.5), tmp_path / "x.safetensors", metadata=extra)
    assert contents(tmp_path / "x.safetensors")[1] == {
        "format": "pt",
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": "2",
        "ss_network_alpha": "1.5",
        "ss_base_model_version": "sd_v1",
    }


def test_pefts_form_passes_through_bit_for_bit(unet: Model, tmp_path: Path):
    layers = mixed_layers(unet)
    write_lora_diffusers(layers, tmp_path / "one.safetensors")
    again = read_file(unet, tmp_path / "one.safetensors")
    assert same(again, layers)
    write_lora_diffusers(again, tmp_path / "two.safetensors")
    (first, said), (second, said_again) = contents(tmp_path / "one.safetensors"), contents(tmp_path / "two.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert said == said_again
    assert {f"unet.{TO_K}.lora_A.weight", f"text_encoder.text_model.{FC1}.lora_B.weight"} <= first.keys()


def test_diffusers_finds_every_rank_and_alpha_in_its_form(unet: Model, tmp_path: Path):
    """By peft's rule for its settings: the first pattern that a module's path ends with, or the common number."""
    from diffusers.utils.state_dict_utils import _load_sft_state_dict_metadata

    layers = mixed_layers(unet)
    write_lora_diffusers(layers, tmp_path / "x.safetensors")
    said: Any = _load_sft_state_dict_metadata(str(tmp_path / "x.safetensors"))
    for one in layers:
        prefix = "unet." if one.part == "denoiser" else "text_encoder."
        own = {key.removeprefix(prefix): value for key, value in said.items() if key.startswith(prefix)}
        for full in (one.name, f"text_model.{one.name}") if one.part == "text_encoder" else (one.name,):
            found = [
                next((v for k, v in own[pattern].items() if re.match(rf"(.*\.)?({k})$", full)), own[rule])
                for rule, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
            ]
            assert found == [one.rank, one.alpha]
            assert any(full == target or full.endswith(f".{target}") for target in own["target_modules"])


def test_kohyas_form_and_diffusers_form_merge_alike(unet: Model, tmp_path: Path):
    write_lora_kohya(mixed_layers(unet), tmp_path / "k.safetensors")
    read_first = read_file(unet, tmp_path / "k.safetensors")
    write_lora_diffusers(read_first, tmp_path / "d.safetensors")
    ways = [merge(unet, layers, 0.8) for layers in (read_first, read_file(unet, tmp_path / "d.safetensors"))]
    assert len(ways[0].differs(unet.weights())) == len(PLACES)
    assert not ways[0].differs(ways[1].weights())


def test_a_transformers_lora_is_written_under_its_folders_name(dit: Model, tmp_path: Path):
    layers = [layer(dit, "denoiser", "transformer_blocks.0.attn1.to_q", alpha=1.0)]
    write_lora_diffusers(layers, tmp_path / "x.safetensors", denoiser_prefix="transformer")
    assert "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight" in contents(tmp_path / "x.safetensors")[0]
    assert same(read_file(dit, tmp_path / "x.safetensors"), layers)


@pytest.mark.parametrize("write", [write_lora_kohya, write_lora_diffusers])
def test_what_cannot_be_written_leaves_no_file(write: Callable[..., None], unet: Model, tmp_path: Path):
    with pytest.raises(ValueError, match="a LoRA of no layers cannot be written"):
        write([], tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"layer {FC1} of the text_encoder occurs 2 times"):
        write([*some_layers(unet), layer(unet, "text_encoder", FC1)], tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())
