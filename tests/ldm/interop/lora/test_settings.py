"""Alpha, by peft's settings in a file's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.loras import (
    CONV,
    CROSS_K,
    PEFT,
    TO_K,
    Model,
    factors,
    mixed_layers,
    read,
    read_file,
    same,
    settings,
)


@pytest.mark.parametrize(
    ("metadata", "alphas"),
    [
        (settings(unet__r=4, unet__lora_alpha=8), (8, 8, 8)),
        (settings(unet__lora_alpha=8, unet__alpha_pattern={TO_K: 2}), (2, 8, 8)),
        (settings(unet__lora_alpha=8, unet__alpha_pattern={"to_k": 2, "attn2.to_k": 3}), (2, 2, 8)),
        (settings(unet__lora_alpha=8, unet__alpha_pattern={"attn2.to_k": 3, "to_k": 2}), (2, 3, 8)),
        (settings(unet__lora_alpha=8, unet__alpha_pattern={"^to_k": 2, f"^{CONV}": 5, "o_k": 6}), (8, 8, 5)),
        (settings(unet__lora_alpha=8, unet__r=9, unet__rank_pattern={"to_k": 4, "conv1": 4}), (8, 8, 8)),
        (settings(unet__lora_alpha=8, unet__use_rslora=True), (16, 16, 16)),  # alpha / sqrt(4) = 2 alpha / 4
        (settings(unet__lora_alpha=8, unet__use_rslora=True, unet__alpha_pattern={"conv1": 1}), (16, 16, 2)),
    ],
)
def test_alpha_is_what_pefts_settings_say(metadata: dict[str, str], alphas: tuple[float, ...], unet: Model):
    weights = {}
    for name in (TO_K, CROSS_K, CONV):
        down, up = factors(unet.module("denoiser", name).weight, 4)
        weights |= {f"unet.{name}{PEFT[0]}": down, f"unet.{name}{PEFT[1]}": up}
    assert tuple(found.alpha for found in read(unet, weights, metadata)) == alphas


def test_a_file_that_diffusers_wrote_is_read_with_its_settings(unet: Model, tmp_path: Path):
    from diffusers.loaders.lora_base import LoraBaseMixin

    layers = mixed_layers(unet)
    weights = {}
    for one in layers:
        path = f"unet.{one.name}" if one.part == "denoiser" else f"text_encoder.text_model.{one.name}"
        weights |= {path + PEFT[0]: one.down, path + PEFT[1]: one.up}
    content: dict[str, Any] = {}
    for part, prefix, inner in (("denoiser", "unet", ""), ("text_encoder", "text_encoder", "text_model.")):
        own = [one for one in layers if one.part == part]
        config = {
            "peft_type": "LORA",
            "init_lora_weights": True,
            "use_dora": False,
            "r": 99,
            "lora_alpha": 99,
            "rank_pattern": {inner + one.name: one.rank for one in own},
            "alpha_pattern": {inner + one.name: one.alpha for one in own},
        }
        content |= {f"{prefix}.{key}": value for key, value in config.items()}
    own_function: Any = None
    LoraBaseMixin.write_lora_layers(weights, str(tmp_path), True, "x.safetensors", own_function, True, content)
    assert same(read_file(unet, tmp_path / "x.safetensors"), layers)


def test_what_a_network_alone_wrote_has_settings_without_prefix(unet: Model):
    down, up = factors(unet.module("denoiser", TO_K).weight, 4)
    (found,) = read(unet, {TO_K + PEFT[0]: down, TO_K + PEFT[1]: up}, settings(r=4, lora_alpha=6))
    assert found.alpha == 6


def test_an_alpha_among_the_weights_counts_more_than_settings(unet: Model):
    down, up = factors(unet.module("denoiser", TO_K).weight, 4)
    weights = {f"unet.{TO_K}{PEFT[0]}": down, f"unet.{TO_K}{PEFT[1]}": up, f"unet.{TO_K}.alpha": torch.tensor(2.0)}
    assert read(unet, weights, settings(unet__lora_alpha=6))[0].alpha == 2
