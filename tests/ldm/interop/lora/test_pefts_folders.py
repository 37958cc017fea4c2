"""Folders that peft wrote merge as peft merges them: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.loras import Model, merge
from torch import nn

from ldm.interop.lora import open_lora, read_lora

peft: Any = importlib.import_module("peft")

LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "proj_in"]
LAYERS = [*LINEAR, "conv1", "conv2", "up_blocks.0.resnets.0.conv_shortcut"]
TEXT = ["q_proj", "k_proj", "fc1"]
# The ends of paths that no layer has are warned of by peft.
pytestmark = pytest.mark.filterwarnings("ignore:The following")
PATTERNS = {"rank_pattern": {"attn2.to_k": 2, "conv2": 5}, "alpha_pattern": {"attn1.to_q": 2.5, "conv1": 7}}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", {"r": 4, "lora_alpha": 6, **PATTERNS}),
    "rank-stabilised LoRA": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "DoRA": ("LoraConfig", {"r": 4, "lora_alpha": 6, "use_dora": True, **PATTERNS}),
    "LoRA with biases": ("LoraConfig", {"r": 4, "lora_alpha": 6, "lora_bias": True}),
    "LoHa": ("LoHaConfig", {"r": 4, "alpha": 6, **PATTERNS}),
    "LoHa in Tucker's form": ("LoHaConfig", {"r": 4, "alpha": 6, "use_effective_conv2d": True}),
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 6, "decompose_both": True, "decompose_factor": 2}),
    "LoKr in Tucker's form": ("LoKrConfig", {"r": 2, "alpha": 6, "use_effective_conv2d": True}),
    "LoKr of full matrices": ("LoKrConfig", {"r": 64, "alpha": 6}),
    "IA3": ("IA3Config", {}),
}


def adapted(network: nn.Module, kind: str, targets: list[str]) -> Any:
    """Give a network a random adapter."""
    name, options = CONFIGS[kind]
    if name == "IA3Config":
        options = {"feedforward_modules": [one for one in targets if one in ("ff.net.2", "fc1", "to_v")]}
    if "lora_bias" in options:  # peft merges these only into layers that have a bias
        targets = [one for one in targets if one not in ("to_q", "to_k", "to_v")]
    found: Any = peft.get_peft_model(network, getattr(peft, name)(target_modules=targets, **options))
    torch.manual_seed(3)
    for path, parameter in found.named_parameters():
        if any(mark in path for mark in ("lora_", "hada_", "lokr_", "ia3_")):
            wanted = 0.2 * torch.randn_like(parameter)
            around = parameter if "magnitude" in path or "ia3_" in path else torch.zeros_like(parameter)
            parameter.data.copy_(around + wanted)
    return found


def ours(model: Model, folder: Path, strength: float = 1.0) -> Model:
    return merge(
        model, [one for weights in open_lora(folder) for one in read_lora(weights, **model._asdict())], strength
    )


def compare(merged: nn.Module, theirs: nn.Module, before: nn.Module, least: int) -> None:
    wanted, start, found = theirs.state_dict(), before.state_dict(), merged.state_dict()
    assert sum(not torch.equal(wanted[name], start[name]) for name in start) >= least
    assert max((found[name] - wanted[name]).abs().max().item() for name in wanted) < 1e-6


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_adapter_of_a_unet_merges_as_in_peft(kind: str, unet: Model, tmp_path: Path):
    theirs = adapted(unet.copy().denoiser, kind, LINEAR[:-1] if kind == "IA3" else LAYERS)
    theirs.save_pretrained(tmp_path)
    merged = ours(unet, tmp_path).denoiser
    compare(merged, theirs.merge_and_unload(), unet.denoiser, least=8)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "LoKr", "IA3"])
def test_an_adapter_of_a_text_encoder_merges_as_in_peft(kind: str, unet: Model, tmp_path: Path):
    theirs = adapted(unet.copy().text_encoder.model, kind, TEXT)
    theirs.save_pretrained(tmp_path)
    merged = ours(unet, tmp_path).text_encoder.model
    compare(merged, theirs.merge_and_unload(), unet.text_encoder.model, least=6)


def test_adapters_of_both_networks_in_folders_of_their_own(unet: Model, tmp_path: Path):
    """As peft's example of DreamBooth writes them, each with settings of its own."""
    both = unet.copy()
    theirs = [adapted(both.denoiser, "LoRA", LINEAR), adapted(both.text_encoder.model, "DoRA", TEXT)]
    for network, folder in zip(theirs, ("unet", "text_encoder"), strict=True):
        network.save_pretrained(tmp_path / folder)
    merged = ours(unet, tmp_path)
    compare(merged.denoiser, theirs[0].merge_and_unload(), unet.denoiser, least=8)
    compare(merged.text_encoder.model, theirs[1].merge_and_unload(), unet.text_encoder.model, least=6)


def test_a_strength_scales_dora_from_nothing_to_pefts_result(unet: Model, tmp_path: Path):
    theirs = adapted(unet.copy().denoiser, "DoRA", LAYERS)
    theirs.save_pretrained(tmp_path)
    wanted, start = theirs.merge_and_unload().state_dict(), unet.denoiser.state_dict()
    found = ours(unet, tmp_path, 0.25).denoiser.state_dict()
    assert max((found[n] - torch.lerp(start[n], wanted[n], 0.25)).abs().max().item() for n in start) < 1e-6


def test_the_file_alone_finds_its_settings_next_to_it(unet: Model, tmp_path: Path):
    adapted(unet.copy().denoiser, "LoRA", LINEAR).save_pretrained(tmp_path)
    by_file = ours(unet, tmp_path / "adapter_model.safetensors")
    assert not by_file.differs(ours(unet, tmp_path).weights())
    (tmp_path / "adapter_config.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(
        ValueError, match=r"alpha lies in adapter_config.json, and layer .* has none: put that file next"
    ):
        ours(unet, tmp_path)
    (tmp_path / "elsewhere.json").rename(tmp_path / "adapter_config.json")  # the remedy
    assert not ours(unet, tmp_path).differs(by_file.weights())


def test_settings_that_ask_for_another_method_are_refused(unet: Model, tmp_path: Path):
    adapted(unet.copy().denoiser, "LoRA", LINEAR).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(content | {"init_lora_weights": "pissa"}))
    with pytest.raises(ValueError, match="init_lora_weights 'pissa', expected True: not supported"):
        ours(unet, tmp_path)
