"""Files that LyCORIS wrote change the layers as LyCORIS itself does in a forward pass, which is what was trained.

LyCORIS's merge_to multiplies LoHa and LoKr by alpha / rank twice (3.2 to 4.1.3), so that it is compared for the others.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from helpers.loras import Model, merge, read
from torch import Tensor, nn

lycoris: Any = importlib.import_module("lycoris")

SIZES = {"lora_dim": 2, "conv_lora_dim": 2, "alpha": 3.0, "conv_alpha": 1.5}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"network_module": "locon"},
    "LoCon in Tucker's form": {"network_module": "locon", "use_tucker": True},
    "LoRA with a scalar": {"network_module": "locon", "use_scalar": True},
    "DoRA of outputs": {"network_module": "locon", "weight_decompose": True},
    "DoRA of inputs": {"network_module": "locon", "weight_decompose": True, "wd_on_out": False},
    "DoRA in Tucker's form": {"network_module": "locon", "use_tucker": True, "weight_decompose": True},
    "LoHa": {"network_module": "loha"},
    "LoHa in Tucker's form": {"network_module": "loha", "use_tucker": True},
    "DoRA of LoHa": {"network_module": "loha", "weight_decompose": True},
    "LoKr": {"network_module": "lokr", "factor": 2},
    "LoKr in Tucker's form": {"network_module": "lokr", "factor": 2, "use_tucker": True},
    "LoKr of full matrices": {"network_module": "lokr", "factor": 4, "full_matrix": True},
    "LoKr, both factored": {"network_module": "lokr", "factor": 8, "decompose_both": True, "lora_dim": 1},
    "DoRA of LoKr": {"network_module": "lokr", "factor": 2, "weight_decompose": True},
    "IA3 of outputs": {"network_module": "ia3"},
    "IA3 of inputs": {"network_module": "ia3", "train_on_input": True},
    "full differences": {"network_module": "full"},
    "diagonal OFT": {"network_module": "diag-oft", "lora_dim": 4, "conv_lora_dim": 4},
    "constrained OFT": {"network_module": "diag-oft", "lora_dim": 4, "conv_lora_dim": 4, "constraint": 1e-2},
    "rescaled OFT": {"network_module": "diag-oft", "lora_dim": 4, "conv_lora_dim": 4, "rescaled": True},
    "BOFT": {"network_module": "boft", "lora_dim": 4, "conv_lora_dim": 4},
    "rescaled BOFT": {"network_module": "boft", "lora_dim": 4, "conv_lora_dim": 4, "rescaled": True},
    "GLoRA": {"network_module": "glora"},
}
# These multiply the change by the strength; of the others only strength 1 is compared. LyCORIS multiplies full
# differences by it twice, unless they are merged.
LINEAR = [kind for kind in KINDS if not kind.startswith(("DoRA", "rescaled", "BOFT", "full"))]
# Of all layers these are compared: all shapes, with and without bias, and those whose inputs and outputs differ.
COMPARED = ("down_blocks.0.", "up_blocks.0.resnets.0.", "conv_in", "time_embedding.linear_1")


def network_on(module: nn.Module, **options: Any) -> Any:
    """Wrap the layers of a network as LyCORIS does, with random numbers."""
    kinds = ["GroupNorm", "LayerNorm"] if options.get("train_norm") else ["Linear", "Conv2d"]
    lycoris.LycorisNetwork.apply_preset({"enable_conv": True, "target_module": kinds, "target_name": []})
    torch.manual_seed(3)
    found = lycoris.LycorisNetwork(module, **SIZES | options)
    assert len(found.loras) > 30
    found.apply_to()
    for lora in found.loras:
        for name, parameter in lora.named_parameters():
            around = parameter if name in ("dora_scale", "weight", "bias", "rescale") else 0.1
            parameter.data.copy_(around + (0.05 if "oft" in name else 0.2) * torch.randn_like(parameter))
    return found


def effective(module: Any, shape: torch.Size) -> Tensor:
    """Return the weight with which a layer computes, by its outputs for one input at a time."""
    if isinstance(module, nn.Linear):
        return (module(torch.eye(module.in_features)) - module(torch.zeros(1, module.in_features))).T
    inputs, kernel = module.in_channels, module.kernel_size
    count = inputs * math.prod(kernel)
    impulses = torch.eye(count).reshape(count, inputs, *kernel)
    options = module.forward.__self__.kw_dict  # of LyCORIS's convolution, next to the layer's own
    padding, module.padding = module.padding, (0, 0)
    options["padding"] = (0, 0)
    outputs = module(impulses) - module(torch.zeros_like(impulses[:1]))
    module.padding = options["padding"] = padding
    return outputs.flatten(1).T.reshape(shape)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_network_of_lycoris_computes_as_its_file_merged_here(kind: str, unet: Model):
    theirs: Any = unet.copy().denoiser
    names = [
        name
        for name, module in theirs.named_modules()
        if name.startswith(COMPARED) and isinstance(module, nn.Linear | nn.Conv2d)
    ]
    network = network_on(theirs, **KINDS[kind])
    tensors = {key: tensor.detach().clone() for key, tensor in network.state_dict().items()}
    assert all(key.startswith("lycoris_") for key in tensors) and len(names) > 15
    changes = read(unet, tensors)
    for strength in (1.0, 0.6) if kind in LINEAR else (1.0,):
        for lora in network.loras:
            lora.multiplier = strength
        merged: Any = merge(unet, changes, strength).denoiser
        found = {name: merged.get_submodule(name).weight for name in names}
        worst = max(
            (effective(theirs.get_submodule(name), mine.shape) - mine).abs().max().item()
            for name, mine in found.items()
        )
        largest = max((unet.module("denoiser", name).weight - mine).abs().max().item() for name, mine in found.items())
        assert largest > 0.02 and worst < 1e-6


@torch.no_grad()
def test_norms_of_lycoris_are_merged_as_lycoris_merges_them(unet: Model):
    theirs = unet.copy().denoiser
    network = network_on(theirs, network_module="locon", train_norm=True)
    merged = merge(unet, read(unet, {key: tensor.clone() for key, tensor in network.state_dict().items()}), 0.6)
    for lora in network.loras:
        weight, bias = lora.get_merged_weight(0.6)
        name = next(name for name, module in theirs.named_modules() if module is lora.org_module[0])
        mine = merged.module("denoiser", name)
        assert (mine.weight - weight).abs().max() < 1e-6 and (mine.bias - bias).abs().max() < 1e-6


def network_on_text(module: nn.Module) -> Any:
    lycoris.LycorisNetwork.apply_preset({"enable_conv": True, "target_module": ["Linear"], "target_name": []})
    torch.manual_seed(3)
    found = lycoris.LycorisNetwork(module, network_module="locon", **SIZES)
    assert len(found.loras) == 12
    found.apply_to()
    for lora in found.loras:
        for parameter in lora.parameters():
            parameter.data.normal_(std=0.2)
    return found


@torch.no_grad()
def test_a_text_encoder_of_lycoris_is_found_by_its_names(unet: Model):
    theirs: Any = unet.copy().text_encoder.model
    network = network_on_text(theirs)
    changes = read(unet, {key: tensor.clone() for key, tensor in network.state_dict().items()})
    merged: Any = merge(unet, changes).text_encoder.model
    for lora in network.loras:
        name = next(name for name, module in theirs.named_modules() if module is lora.org_module[0])
        assert (merged.get_submodule(name).weight - lora.get_merged_weight()[0]).abs().max() < 1e-6
