"""What is no LoRA for this model, by its name, with no weight changed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import pytest
import torch
from helpers.loras import (
    CONV,
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
Q = TO_K.replace("to_k", "to_q")
OTHER = K.replace("to_k", "to_q")
SDXL = {
    f"lora_unet_input_blocks_4_1_transformer_blocks_{i}_attn1_to_k{ending}": torch.ones(4, 4)
    for i in range(7)
    for ending in KOHYA
}
REFUSED: dict[str, tuple[Mapping[str, Tensor | None], str]] = {
    "DoRA without a LoRA": (
        {f"{K}{end}": None for end in KOHYA} | {f"{K}.dora_scale": torch.ones(16, 1)},
        rf"layer {K} has dora_scale \(DoRA\), expected one and a LoRA",
    ),
    "two magnitudes": (
        {f"{K}.dora_scale": torch.ones(16, 1), f"{K}.lora_magnitude_vector": torch.ones(16)},
        "has dora_scale and magnitude",
    ),
    "magnitudes of another layer": (
        {f"{K}.dora_scale": torch.ones(17, 1)},
        r"1 of its 1 layers do not fit, as .*to_k has magnitudes \(17, 1\) for a weight of \(16, 16\)",
    ),
    "a magnitude for all": ({f"{K}.dora_scale": torch.ones(1, 1)}, "has magnitudes"),
    "LoRA and LoHa": ({f"{K}.hada_w1_a": torch.ones(16, 4)}, f"layer {K} is both LoRA and LoHa: not supported"),
    "half a LoHa": (
        {f"{OTHER}.hada_w1_a": torch.ones(16, 4)},
        f"layer {OTHER} has no hada_w1_b and no hada_w2_a and no",
    ),
    "LoHa of two shapes": (
        {f"{OTHER}.hada_w1_a": torch.ones(16, 4), f"{OTHER}.hada_w1_b": torch.ones(4, 16)}
        | {f"{OTHER}.hada_w2_a": torch.ones(16, 4), f"{OTHER}.hada_w2_b": torch.ones(4, 1)},
        r"1 of its 2 layers do not fit, as .* has hada_w1_a \(16, 4\), hada_w1_b .* for a weight of \(16, 16\)",
    ),
    "half a LoKr": ({f"{OTHER}.lokr_w1": torch.ones(4, 4)}, f"layer {OTHER} has no lokr_w2: get"),
    "half a product": (
        {f"{OTHER}.lokr_w1": torch.ones(4, 4), f"{OTHER}.lokr_w2_a": torch.ones(4, 2)},
        f"layer {OTHER} has no lokr_w2_b",
    ),
    "two LoKr": (
        {f"{OTHER}.lokr_{name}": torch.ones(4, 4) for name in ("w1", "w1_a", "w1_b", "w2")},
        f"layer {OTHER} has both lokr_w1 and lokr_w1_a: get",
    ),
    "LoKr of another layer": (
        {f"{OTHER}.lokr_w1": torch.ones(4, 4), f"{OTHER}.lokr_w2": torch.ones(4, 5)},
        r"1 of its 2 layers do not fit, as .* has lokr_w1 \(4, 4\), lokr_w2 \(4, 5\) for a weight of \(16, 16\)",
    ),
    "a huge LoKr": (
        {f"{OTHER}.lokr_w1": torch.ones(3000, 1000), f"{OTHER}.lokr_w2": torch.ones(3000, 1000)},
        "1 of its 2 layers do not fit",
    ),
    "Tucker's form for a matrix": ({f"{K}.lora_mid.weight": torch.ones(4, 4, 3, 3)}, r"has .*mid \(4, 4, 3, 3\)"),
    "IA3 without numbers": ({f"{OTHER}.on_input": torch.tensor(1)}, f"layer {OTHER} has no ia3_weight"),
    "IA3 of two flags": (
        {f"{OTHER}.on_input": torch.ones(2), f"{OTHER}.weight": torch.ones(16)},
        r"on_input has shape \(2,\), expected one number",
    ),
    "IA3 of peft with other numbers": (
        {f"unet.{Q}.ia3_l": torch.ones(4, 4)},
        r"an ia3_l of shape \(4, 4\), expected 1 x",
    ),
    "OFT of blocks that do not fit": ({f"{OTHER}.oft_blocks": torch.ones(3, 4, 4)}, "1 of its 2 layers do not fit"),
    "BOFT of too many steps": ({f"{OTHER}.oft_blocks": torch.ones(9, 4, 4, 4)}, "1 of its 2 layers do not fit"),
    "GLoRA of another layer": (
        {f"{OTHER}.{name}.weight": torch.ones(4, 4) for name in ("a1", "a2", "b1", "b2")},
        r"as .*to_q has a1 \(4, 4\), a2 \(4, 4\)",
    ),
    "a difference of another layer": (
        {f"{OTHER}.diff": torch.ones(16, 1)},
        r"has diff \(16, 1\) for a weight of \(16, 16\)",
    ),
    "a bias where there is none": (
        {f"{K}.diff_b": torch.ones(16)},
        "1 of its 2 layers do not fit, as .*to_k has a change of its bias, which this layer lacks",
    ),
    "a norm's change for a matrix": (
        {f"{OTHER}.w_norm": torch.ones(16)},
        r"has diff \(16,\) for a weight of \(16, 16\)",
    ),
    "a LoRA for a norm": (
        {
            f"lora_unet_conv_norm_out{KOHYA[0]}": torch.ones(4, 16),
            f"lora_unet_conv_norm_out{KOHYA[1]}": torch.ones(16, 4),
        },
        r"conv_norm_out has factors \(4, 16\) and \(16, 4\) for a weight of \(16,\)",
    ),
    "OFT of peft": ({f"unet.{Q}.oft_R.weight": torch.ones(4, 6)}, "this is OFT or BOFT of peft, by its tensor unet."),
    "BOFT of peft": ({f"unet.{Q}.boft_R": torch.ones(1, 4, 4, 4)}, "this is OFT or BOFT of peft"),
    "AdaLoRA": ({f"unet.{Q}.lora_E": torch.ones(4, 1)}, "this is AdaLoRA"),
    "VeRA": ({f"unet.{Q}.vera_lambda_b": torch.ones(16)}, "this is VeRA"),
    "T-LoRA": ({f"{OTHER}.q_layer.weight": torch.ones(4, 16)}, "this is T-LoRA"),
    "a table": ({"text_encoder.embeddings.lora_embedding_A": torch.ones(4, 9)}, "a LoRA of a table of embeddings"),
    "sparse biases": ({f"{K}.bias_values": torch.ones(4)}, "a LoRA with sparse biases"),
    "new weights": ({f"{K}.set_weight": torch.ones(16, 16)}, "a file that replaces or reshapes weights"),
    "peft's own without its settings": (
        {f"{K}{end}": None for end in KOHYA}
        | {f"{K}.alpha": None}
        | {
            f"base_model.model.{TO_K}{end}": torch.ones(4, 16).T if end == PEFT[1] else torch.ones(4, 16)
            for end in PEFT
        },
        "in peft's own form, whose alpha lies in adapter_config.json, and layer base_model.model.* has none: put",
    ),
    "a bias without its factor": ({f"unet.{CONV}.lora_B.bias": torch.ones(16)}, f"layer unet.{CONV} has no up: get"),
    "bias": ({f"{K}.lora_up.bias": torch.ones(16)}, rf"1 tensors \({K}.lora_up.bias\) belong to no layer of a LoRA"),
    "a weight of its own": (
        {f"{K}.weight": torch.ones(16, 16)},
        rf"1 tensors \({K}.weight\) belong to no layer of a LoRA",
    ),
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
    "neither": (
        {f"{K}{KOHYA[0]}": None, f"{K}{KOHYA[1]}": None, f"{K}.lora_mid.weight": torch.ones(4, 4, 3, 3)},
        f"layer {K} has no down and no up",
    ),
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
    weights = {key: tensor for key, tensor in {**good(), **change}.items() if tensor is not None}
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
        (
            {f"{K}.alpha": torch.tensor(1.0)},
            r"none of its 1 tensors \(.*alpha\) is of a kind of LoRA that is known here",
        ),
        (
            {f"{K}.lora_x": torch.ones(4, 4)},
            r"none of its 1 tensors \(.*lora_x\) is of a kind of LoRA that is known here",
        ),
        ({"bundle_emb.cat.emb_params": torch.ones(2, 16)}, r"this holds 1 embeddings \(cat\) and no LoRA"),
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
        (settings(unet__lora_alpha=8, unet__use_dora=True), "has use_dora, but layer unet.* has no magnitudes"),
        (settings(unet__lora_alpha=8, unet__peft_type="ADALORA"), "peft_type 'ADALORA', expected 'LORA'"),
        (settings(unet__lora_alpha=8, unet__init_lora_weights="pissa"), "init_lora_weights 'pissa', expected"),
        (settings(lora_alpha=8), f"states the alpha of some layers, but not of unet.{TO_K}"),
        (settings(text_encoder__lora_alpha=8), f"states the alpha of some layers, but not of unet.{TO_K}"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(metadata: dict[str, str], message: str, unet: Model):
    weights = {f"unet.{TO_K}{PEFT[0]}": torch.ones(4, 16), f"unet.{TO_K}{PEFT[1]}": torch.ones(16, 4)}
    assert re.search(message, refusal(unet, weights, metadata))
