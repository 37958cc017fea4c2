"""What is no LoRA for this model, by its name, with no weight changed."""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers.loras import (
    CROSS_K,
    FC1,
    KOHYA,
    PEFT,
    SOURCE,
    TO_K,
    Model,
    merge,
    read,
    settings,
)
from torch import Tensor

from ldm.interop.lora import merge_lora

K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
SDXL = {
    f"lora_unet_input_blocks_4_1_transformer_blocks_{i}_attn1_to_k{ending}": torch.ones(4, 4)
    for i in range(7)
    for ending in KOHYA
}
REFUSED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "DoRA of kohya": (
        {f"{K}.dora_scale": torch.ones(16, 1)},
        rf"this is DoRA, by its tensor {K}.dora_scale: not suppo",
    ),
    "DoRA of peft": ({f"unet.{TO_K}.lora_magnitude_vector": torch.ones(16)}, "this is DoRA"),
    "LoHa": ({f"{K}.hada_w1_a": torch.ones(16, 4)}, "this is LoHa"),
    "LoKr": ({f"{K}.lokr_w1": torch.ones(4, 4)}, "this is LoKr"),
    "IA3": ({f"{K}.on_input": torch.ones(1)}, "this is IA3"),
    "OFT": ({f"{K}.oft_blocks": torch.ones(1)}, "this is OFT"),
    "CP": ({f"{K}.lora_mid.weight": torch.ones(4, 4, 3, 3)}, "CP-decomposed convolutions"),
    "GLoRA": ({f"{K}.a1.weight": torch.ones(4, 4)}, "this is GLoRA"),
    "diff": ({f"{K}.diff": torch.ones(16, 16)}, r"full weight differences \(diff\)"),
    "diff_b": ({f"{K}.diff_b": torch.ones(16)}, "full weight differences"),
    "norms": ({"lora_unet_conv_norm_out.w_norm": torch.ones(16)}, "with normalisation layers"),
    "peft's own": ({f"base_model.model.{TO_K}{PEFT[0]}": torch.ones(4, 16)}, "in peft's own form, whose alpha lies in"),
    "bias": ({f"{K}.lora_up.bias": torch.ones(16)}, rf"1 tensors \({K}.lora_up.bias\) belong to no layer of a LoRA"),
    "words": ({"bundle_emb.cat.string_to_param": torch.ones(16)}, "1 tensors .* belong to no layer of a LoRA"),
    "SDXL": (
        {**SDXL, f"lora_te2_text_model_encoder_layers_0_mlp_fc1{KOHYA[0]}": torch.ones(4, 4)},
        r"this LoRA was made for another model \(looks like SDXL\): of its 9 layers this one lacks 8 \((lora_unet_input"
        r"\w+, ){5}\.\.\.\): give a LoRA for this model$",
    ),
    "SDXL in diffusers' form": (
        {f"text_encoder_2.text_model.{FC1}{PEFT[0]}": torch.ones(4, 4)},
        r"looks like SDXL\): of its 2 layers this one lacks 1 \(",
    ),
    "Flux": (
        {f"transformer.single_transformer_blocks.0.attn.to_q{PEFT[0]}": torch.ones(4, 4)},
        r"looks like Flux\): of its 2 layers this one lacks 1",
    ),
    "a deeper model": (
        {f"lora_te_text_model_encoder_layers_23_mlp_fc1{KOHYA[0]}": torch.ones(4, 4)},
        r"made for another model: of its 2 layers this one lacks 1 \(lora_te_text_model_encoder_layers_23_mlp_fc1\)",
    ),
    "CompVis's names for a model without": (
        {f"lora_unet_input_blocks_1_1_proj_in{KOHYA[0]}": torch.ones(4, 16)},
        "made for another model: of its 2 layers this one lacks 1",
    ),
    "no up": ({f"{K}{KOHYA[1]}": None}, f"layer {K} has no up: get the file again"),
    "no down": ({f"{K}{KOHYA[0]}": None}, f"layer {K} has no down"),
    "alpha alone": ({f"{K}{KOHYA[0]}": None, f"{K}{KOHYA[1]}": None}, f"layer {K} has no down and no up"),
    "two ranks": ({f"{K}{KOHYA[1]}": torch.ones(16, 2)}, r"a down of shape \(4, 16\) and an up of \(16, 2\), expected"),
    "other inputs": (
        {f"{K}{KOHYA[0]}": torch.ones(4, 15)},
        r"another model: 1 of its 1 layers do not fit, as .*to_k has factors \(4, 15\) and \(16, 4\) for .*\(16, 16\)",
    ),
    "other outputs": ({f"{K}{KOHYA[1]}": torch.ones(17, 4)}, "1 of its 1 layers do not fit"),
    "a kernel for a matrix": ({f"{K}{KOHYA[0]}": torch.ones(4, 16, 3, 3)}, "1 of its 1 layers do not fit"),
    "a row": ({f"{K}{KOHYA[0]}": torch.ones(16)}, r"a down of shape \(16,\)"),
    "a number": ({f"{K}{KOHYA[0]}": torch.tensor(1.0)}, r"a down of shape \(\)"),
    "Stable Diffusion 1": (
        {f"unet.{CROSS_K}{PEFT[0]}": torch.ones(4, 768), f"unet.{CROSS_K}{PEFT[1]}": torch.ones(16, 4)},
        r"another model \(looks like Stable Diffusion 1\): 1 of its 2 layers do not fit, as .*\(4, 768\)",
    ),
    "alpha of two numbers": ({f"{K}.alpha": torch.ones(2)}, rf"tensor {K}.alpha has shape \(2,\), expected one number"),
    "alpha infinite": ({f"{K}.alpha": torch.tensor(math.inf)}, f"tensor {K}.alpha holds NaN or infinity"),
    "alpha of truth": ({f"{K}.alpha": torch.tensor(True)}, f"tensor {K}.alpha holds bool, expected fp16, bf16, fp32"),
    "NaN": ({f"{K}{KOHYA[0]}": torch.full((4, 16), math.nan)}, f"tensor {K}.lora_down.weight holds NaN or infinity"),
    "whole numbers": ({f"{K}{KOHYA[0]}": torch.ones(4, 16, dtype=torch.int8)}, "holds int8, expected fp16, bf16, fp32"),
    "fp8": ({f"{K}{KOHYA[0]}": torch.ones(4, 16).to(torch.float8_e4m3fn)}, "holds float8_e4m3fn, expected"),
    "twice": (
        {f"unet.{TO_K}{PEFT[0]}": torch.ones(4, 16), f"unet.{TO_K}{PEFT[1]}": torch.ones(16, 4)},
        f"{K} and unet.{TO_K} are the same layer",
    ),
    "a second down": ({f"{K}{PEFT[0]}": torch.ones(4, 16)}, f"layer {K} has a second down, {K}.lora_A.weight"),
}


def good() -> dict[str, Tensor]:
    return {f"{K}{KOHYA[0]}": torch.ones(4, 16), f"{K}{KOHYA[1]}": torch.ones(16, 4), f"{K}.alpha": torch.tensor(2.0)}


def refusal(model: Model, weights: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """The message, which is one line that begins with the file's name."""
    changed = model.copy()
    with pytest.raises(ValueError) as error:
        merge_lora(read(changed, weights, metadata), **changed._asdict(), strength=1.0)
    assert not changed.differs(model.weights())
    message = str(error.value)
    assert message.startswith(f"{SOURCE}: ") and "\n" not in message
    return message.removeprefix(f"{SOURCE}: ")


def test_what_the_refused_files_are_made_of_is_accepted(unet: Model):
    assert merge(unet, read(unet, good())).differs(unet.weights()) == {f"{TO_K}.weight"}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_lora_for_this_model_is_refused_by_name(case: str, unet: Model):
    change, message = REFUSED[case]
    weights = {key: tensor for key, tensor in (good() | change).items() if tensor is not None}
    assert re.search(message, refusal(unet, weights))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "this is not a LoRA, 0 tensors"),
        (
            {"model.diffusion_model.out.2.weight": torch.ones(4, 4)},
            "not a LoRA, 1 tensors .*, looks like a complete model:",
        ),
        ({"emb_params": torch.ones(2, 768)}, "looks like words for a model"),
        ({"control_model.out.weight": torch.ones(4, 4)}, "looks like a ControlNet"),
        ({f"{TO_K}.weight": torch.ones(16, 16)}, rf"this is not a LoRA, 1 tensors \({TO_K}.weight\): give a LoRA file"),
    ],
)
def test_what_is_no_lora_at_all_is_refused(weights: dict[str, Tensor], message: str, unet: Model):
    assert re.search(message, refusal(unet, weights))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lora_adapter_metadata": "{half"}, "metadata lora_adapter_metadata is not JSON"),
        ({"lora_adapter_metadata": "[" * 100_000}, "metadata lora_adapter_metadata is not JSON"),
        ({"lora_adapter_metadata": "[1]"}, "metadata lora_adapter_metadata must hold a JSON object, not a list"),
        (settings(unet__r=4), "gives .*to_k the alpha None, expected a number"),
        (settings(unet__lora_alpha="8"), "the alpha '8', expected a number"),
        (settings(unet__lora_alpha=True), "the alpha True, expected a number"),
        (settings(unet__lora_alpha=math.nan), "the alpha nan, expected a number"),
        (settings(unet__lora_alpha=10**400), "the alpha 10+, expected a number"),
        (settings(unet__lora_alpha=8, unet__alpha_pattern={"to_k": None}), "the alpha None"),
        (settings(unet__lora_alpha=8, unet__alpha_pattern=[1]), r"alpha_pattern '\[1\]', expected numbers by module"),
        (settings(unet__lora_alpha=8, unet__rank_pattern={"(a+)+": 1}), r"for '\(a\+\)\+', expected the path of a mod"),
        (settings(unet__lora_alpha=8, unet__r=2), "has rank 4, but metadata lora_adapter_metadata says 2"),
        (settings(unet__lora_alpha=8, unet__use_dora=True), "this is DoRA, by its metadata use_dora"),
        (settings(unet__lora_alpha=8, unet__peft_type="LOHA"), "peft_type 'LOHA', expected"),
        (settings(unet__lora_alpha=8, unet__init_lora_weights="pissa"), "init_lora_weights 'pissa', expected"),
        (settings(lora_alpha=8), f"states the alpha of some layers, but not of unet.{TO_K}"),
        (settings(text_encoder__lora_alpha=8), f"states the alpha of some layers, but not of unet.{TO_K}"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(metadata: dict[str, str], message: str, unet: Model):
    weights = {f"unet.{TO_K}{PEFT[0]}": torch.ones(4, 16), f"unet.{TO_K}{PEFT[1]}": torch.ones(16, 4)}
    assert re.search(message, refusal(unet, weights, metadata))
