"""LoRA files in all forms: which layer a name means."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.loras import (
    BLOCK,
    CONV,
    FC1,
    KOHYA,
    LINEAR_LAYER,
    LINEAR_UNET,
    LORA,
    PEFT,
    PROJ,
    Q_PROJ,
    STRIDED,
    TO_K,
    TO_OUT,
    UNET,
    Model,
    build,
    factors,
    layer,
    merge,
    read,
    same,
    some_layers,
)
from torch import Tensor, nn

from ldm.denoisers import UNetConfig
from ldm.interop.compvis.names import unet_modules
from ldm.interop.lora import LoraLayer, Part, merge_lora, write_lora_kohya
from ldm.interop.weight_reader import open_weights

NAMED = (".lora_A.default.weight", ".lora_B.default.weight")
PROCESSOR = ("_lora.down.weight", "_lora.up.weight")
FLAT_BLOCK = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0"
TEXT_LAYER = "encoder.layers.1.self_attn"

FORMS: list[tuple[str, tuple[str, str], Part, str]] = [
    (f"{FLAT_BLOCK}_attn1_to_k", KOHYA, "denoiser", TO_K),
    (f"{FLAT_BLOCK}_attn1_to_out_0", KOHYA, "denoiser", TO_OUT),
    ("lora_unet_down_blocks_0_resnets_0_conv1", KOHYA, "denoiser", CONV),
    ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_k", KOHYA, "denoiser", TO_K),
    ("lora_unet_input_blocks_1_0_in_layers_2", KOHYA, "denoiser", CONV),
    ("lora_unet_input_blocks_2_0_op", KOHYA, "denoiser", STRIDED),
    ("lora_unet_middle_block_1_proj_in", KOHYA, "denoiser", PROJ),
    ("lora_unet_output_blocks_3_1_proj_out", KOHYA, "denoiser", "up_blocks.1.attentions.1.proj_out"),
    ("lora_unet_time_embed_0", KOHYA, "denoiser", "time_embedding.linear_1"),
    ("lora_te_text_model_encoder_layers_1_self_attn_q_proj", KOHYA, "text_encoder", Q_PROJ),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1", KOHYA, "text_encoder", FC1),
    ("lora_te1_encoder_layers_0_mlp_fc1", KOHYA, "text_encoder", FC1),
    (f"unet.{TO_K}", PEFT, "denoiser", TO_K),
    (f"unet.{CONV}", PEFT, "denoiser", CONV),
    (CONV, PEFT, "denoiser", CONV),
    (f"text_encoder.text_model.{Q_PROJ}", PEFT, "text_encoder", Q_PROJ),
    (f"text_encoder.{FC1}", PEFT, "text_encoder", FC1),
    (f"unet.{TO_OUT}", LORA, "denoiser", TO_OUT),
    (f"unet.{BLOCK}.attn1.processor.to_k", PROCESSOR, "denoiser", TO_K),
    (f"unet.{BLOCK}.attn1.processor.to_out", PROCESSOR, "denoiser", TO_OUT),
    (f"{BLOCK}.attn1.processor.to_out", PROCESSOR, "denoiser", TO_OUT),
    (f"text_encoder.text_model.{Q_PROJ}", LINEAR_LAYER, "text_encoder", Q_PROJ),
    (f"text_encoder.text_model.{FC1}", LINEAR_LAYER, "text_encoder", FC1),
    (f"text_encoder.text_model.{TEXT_LAYER}.to_q", PROCESSOR, "text_encoder", Q_PROJ),
    (f"text_encoder.text_model.{TEXT_LAYER}.to_out", PROCESSOR, "text_encoder", f"{TEXT_LAYER}.out_proj"),
    # ComfyUI (comfy/lora.py): the path in the model that it holds, which is CompVis's, and CLIP's
    ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k", PEFT, "denoiser", TO_K),
    ("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k", KOHYA, "denoiser", TO_K),
    ("model.diffusion_model.middle_block.1.proj_in", KOHYA, "denoiser", PROJ),
    (f"diffusion_model.{TO_K}", PEFT, "denoiser", TO_K),
    (f"text_encoders.clip_l.transformer.text_model.{Q_PROJ}", KOHYA, "text_encoder", Q_PROJ),
    (f"clip_h.transformer.text_model.{FC1}", KOHYA, "text_encoder", FC1),
    # LyCORIS on a network alone, and SimpleTuner
    ("lycoris_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k", KOHYA, "denoiser", TO_K),
    ("lycoris_input_blocks_1_0_in_layers_2", KOHYA, "denoiser", CONV),
    ("lycoris_text_model_encoder_layers_0_mlp_fc1", KOHYA, "text_encoder", FC1),
    ("lycoris_encoder_layers_0_mlp_fc1", KOHYA, "text_encoder", FC1),
    # peft, with the name of an adapter, and in its own form
    (f"unet.{TO_K}", NAMED, "denoiser", TO_K),
    (f"text_encoder.text_model.{FC1}", NAMED, "text_encoder", FC1),
    (f"base_model.model.{TO_K}", PEFT, "denoiser", TO_K),
    (f"base_model.model.text_model.{Q_PROJ}", PEFT, "text_encoder", Q_PROJ),
    (f"base_model.model.{Q_PROJ}", NAMED, "text_encoder", Q_PROJ),
    (f"unet.base_model.model.{CONV}", PEFT, "denoiser", CONV),
    (f"unet.{TO_K}", (".lora_A", ".lora_B"), "denoiser", TO_K),
    (f"unet.{TO_K}", (".lora_A.my-style_2.weight", ".lora_B.my-style_2.weight"), "denoiser", TO_K),
    # a prefix that kohya's OFT has
    ("oft_unet_down_blocks_0_resnets_0_conv1", KOHYA, "denoiser", CONV),
]
WITHOUT_ALPHA = [form for form in FORMS if "base_model" not in form[0]]


ALPHAS = [None, torch.tensor(1.5), torch.tensor([1.5]).half(), torch.tensor(7)]
CASES = [(*form, alpha) for form in FORMS for alpha in ALPHAS if alpha is not None or form in WITHOUT_ALPHA]


@pytest.mark.parametrize(("path", "endings", "part", "name", "alpha"), CASES)
def test_each_form_is_read(
    path: str, endings: tuple[str, str], part: Part, name: str, alpha: Tensor | None, unet: Model
):
    down, up = factors(unet.module(part, name).weight, 4)
    weights = {path + endings[0]: down, path + endings[1]: up} | ({} if alpha is None else {f"{path}.alpha": alpha})
    names = {theirs: ours for ours, theirs in unet_modules(unet.denoiser, UNET).items()}
    (found,) = read(unet, weights, compvis_names=names)
    assert (found.part, found.name, found.alpha) == (part, name, 4.0 if alpha is None else float(alpha))
    assert torch.equal(found.down, down) and torch.equal(found.up, up)


def test_a_text_encoder_of_older_transformers_is_found_too(unet: Model):
    """Their CLIPTextModel has everything below text_model."""
    older: Any = nn.Module()
    older.model = nn.Module()
    older.model.text_model = copy.deepcopy(unet.text_encoder.model)
    layers = some_layers(unet)
    weights = {}
    for one in layers:
        path = f"unet.{one.name}" if one.part == "denoiser" else f"text_encoder.{one.name}"
        weights |= {path + PEFT[0]: one.down, path + PEFT[1]: one.up, f"{path}.alpha": torch.tensor(one.alpha)}
    old = Model(copy.deepcopy(unet.denoiser), older)
    assert same(read(old, weights), layers)
    merge_lora(layers, **old._asdict(), strength=1.0)
    for name in (Q_PROJ, FC1):
        merged = merge(unet, layers).module("text_encoder", name).weight
        own: Any = older.model.text_model.get_submodule(name)
        assert torch.equal(own.weight, merged)


def test_a_transformer_is_read_too(dit: Model):
    name = "transformer_blocks.1.attn2.to_out.0"
    down, up = factors(dit.module("denoiser", name).weight, 2)
    for path, (first, second) in (
        (f"transformer.{name}", PEFT),
        ("transformer.transformer_blocks.1.attn2.processor.to_out", PROCESSOR),
        (name, PEFT),
        ("lora_unet_transformer_blocks_1_attn2_to_out_0", KOHYA),
    ):
        assert same(read(dit, {path + first: down, path + second: up}), [LoraLayer("denoiser", name, down, up, 2.0)])


@pytest.mark.parametrize("config", [UNET, LINEAR_UNET], ids=["convolution", "linear"])
@pytest.mark.parametrize("trained", ["matrices", "convolutions"])
def test_a_matrix_serves_a_1x1_convolution_and_the_reverse(config: UNetConfig, trained: str):
    model = build(config)
    down, up = torch.randn(2, 32), torch.randn(32, 2)
    shaped = (down, up) if trained == "matrices" else (down[:, :, None, None], up[:, :, None, None])
    name = f"lora_unet_{PROJ.replace('.', '_')}"
    layers = read(model, {name + ending: tensor for ending, tensor in zip(KOHYA, shaped, strict=True)})
    change = merge(model, layers).module("denoiser", PROJ).weight - model.module("denoiser", PROJ).weight
    assert layers[0].down.ndim == (2 if config.use_linear_projection else 4)
    assert (change.flatten(1) - up @ down).abs().max() < 1e-5


def test_diffusers_gives_kohyas_names_the_same_meaning(unet: Model, tmp_path: Path):
    """Of every layer of the networks: what we write is turned by their own conversion into the names that we read."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
    from diffusers.utils.state_dict_utils import convert_all_state_dict_to_peft, convert_unet_state_dict_to_peft

    places: list[tuple[Part, str]] = [
        ("denoiser" if i == 0 else "text_encoder", name)
        for i, network in enumerate((unet.denoiser, unet.text_encoder.model))
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    assert len(places) > 80
    layers = [layer(unet, *place, seed=seed) for seed, place in enumerate(places)]
    write_lora_kohya(layers, tmp_path / "k.safetensors")
    converted, _ = _convert_non_diffusers_lora_to_diffusers(open_weights(tmp_path / "k.safetensors").tensors)
    assert same(read(unet, {**converted} | alphas_of(converted, 3.0)), layers)
    of_unet = {key: tensor for key, tensor in converted.items() if key.startswith("unet.")}
    of_text = {key: tensor for key, tensor in converted.items() if key.startswith("text_encoder.")}
    peft = convert_unet_state_dict_to_peft(of_unet) | convert_all_state_dict_to_peft(of_text)
    assert sorted(key for key in peft if key.endswith(".lora_A.weight")) == sorted(
        f"{'unet' if part == 'denoiser' else 'text_encoder.text_model'}.{name}.lora_A.weight" for part, name in places
    )
    assert same(read(unet, peft | alphas_of(peft, 3.0)), layers)


def alphas_of(weights: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """An alpha beside every down."""
    down = re.compile(r"(\.lora_A|\.lora\.down|_lora\.down|\.lora_linear_layer\.down)\.weight$")
    return {down.sub(".alpha", key): torch.tensor(alpha) for key in weights if down.search(key)}


def test_diffusers_gives_compvis_names_the_same_meaning(unet: Model):
    """Of the attention's layers, which are what their conversion is made for."""
    from types import SimpleNamespace

    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    theirs = {
        ours: path for ours, path in unet_modules(unet.denoiser, UNET).items() if re.search("attn|ff|proj_", ours)
    }
    layers = [
        layer(unet, "denoiser", name, seed=seed)
        for seed, name in enumerate(theirs)
        if isinstance(unet.module("denoiser", name), nn.Linear | nn.Conv2d)
    ]
    assert len(layers) > 40
    weights = {}
    for one in layers:
        path = f"lora_unet_{theirs[one.name].replace('.', '_')}"
        weights |= {path + KOHYA[0]: one.down, path + KOHYA[1]: one.up, f"{path}.alpha": torch.tensor(one.alpha)}
    ours = read(unet, weights, compvis_names={path: name for name, path in theirs.items()})
    assert same(ours, layers)
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(weights), SimpleNamespace(layers_per_block=1))
    converted, _ = _convert_non_diffusers_lora_to_diffusers(mapped)
    assert same(read(unet, converted | alphas_of(converted, 3.0)), layers)
