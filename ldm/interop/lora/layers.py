"""The layers of a LoRA, and their merging into weights. Shapes: r rank, i inputs, o outputs, k kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

Part = Literal["denoiser", "text_encoder"]
Adaptable = nn.Linear | nn.Conv2d
OLD_TEXT_PREFIX = "text_model."  # of the modules of CLIPTextModel before transformers 5.6


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """A change of one layer's weight: alpha / rank * up @ down.

    For a linear layer down is r x i, up o x r; for a convolution r x i x k x k and o x r x 1 x 1. Raises ValueError,
    naming the layer, if the ranks differ or alpha is not finite.
    """

    part: Part
    name: str  # path of the module, as in diffusers' networks and in CLIPTextModel, without `text_model.`
    down: Tensor
    up: Tensor
    alpha: float

    def __post_init__(self) -> None:
        if min(self.down.ndim, self.up.ndim) < 2 or self.down.shape[0] != self.up.shape[1] or self.rank < 1:
            raise ValueError(
                f"layer {self.name} has a down of shape {tuple(self.down.shape)} and an up of {tuple(self.up.shape)}, "
                "expected rank x inputs and outputs x rank, of the same rank: get the file again"
            )
        if not math.isfinite(self.alpha):
            raise ValueError(f"layer {self.name} has alpha {self.alpha}, expected a finite number: get the file again")

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def change(self, device: torch.device | None = None) -> Tensor:
        """Compute the change of the weight at strength 1, in the weight's shape, float32."""
        down = self.down.to(device, torch.float32).flatten(1)  # r, i * k * k
        up = self.up.to(device, torch.float32).flatten(1)  # o, r
        return (up @ down).mul_(self.alpha / self.rank).unflatten(1, self.down.shape[1:])

    def largest(self) -> float:
        """Return an upper bound on the absolute values of the change; infinity or NaN if a factor has them."""
        return abs(self.alpha) * self.up.abs().max().item() * self.down.abs().max().item()


def adaptable_layers(denoiser: nn.Module, text_encoder: nn.Module) -> dict[tuple[Part, str], Adaptable]:
    """Collect the linear and convolutional layers of a denoiser and a TransformersTextEncoder, by part and name."""
    parts: dict[Part, nn.Module] = {"denoiser": denoiser, "text_encoder": text_encoder.get_submodule("model")}
    return {
        (part, name.removeprefix(OLD_TEXT_PREFIX) if part == "text_encoder" else name): module
        for part, network in parts.items()
        for name, module in network.named_modules()
        if isinstance(module, Adaptable)
    }


def factor_shapes(weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of down and up, for a layer's weight o x i or o x i x k x k."""
    outputs, *others = weight.shape
    return (rank, *others), (outputs, rank, *[1] * (len(others) - 1))


@torch.no_grad()
def merge_lora(layers: Sequence[LoraLayer], *, denoiser: nn.Module, text_encoder: nn.Module, strength: float) -> int:
    """Add the LoRA: W <- W + strength * alpha / rank * up @ down, in float32, rounded once. Returns the layer count.

    Raises ValueError, before any weight is changed, if the strength is not finite, a layer does not belong to the
    model, or its weight could overflow its precision.
    """
    if not math.isfinite(strength):
        raise ValueError(f"the strength of a LoRA is {strength}, expected a finite number")
    modules = adaptable_layers(denoiser, text_encoder)
    weights = [_weight(layer, modules, strength) for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        weight.add_(layer.change(weight.device), alpha=strength)
    return len(weights)


def _weight(layer: LoraLayer, modules: Mapping[tuple[Part, str], Adaptable], strength: float) -> Tensor:
    """Find the weight that a layer changes, and check that it fits."""
    module = modules.get((layer.part, layer.name))
    if module is None:
        raise ValueError(
            f"the {layer.part} has no linear or convolutional layer {layer.name}: give the model of this LoRA"
        )
    weight = module.weight
    if (layer.down.shape, layer.up.shape) != factor_shapes(weight, layer.rank):
        raise ValueError(misfit(layer.name, layer.down, layer.up, weight) + ": give the model of this LoRA")
    largest = abs(strength) * layer.largest()
    if not largest <= torch.finfo(weight.dtype).max:
        raise ValueError(
            f"a LoRA of strength {strength:g} changes {layer.name} by up to {largest:g}, more than "
            f"{str(weight.dtype).removeprefix('torch.')} holds: lower the strength, or get the file again"
        )
    return weight


def misfit(name: str, down: Tensor, up: Tensor, weight: Tensor) -> str:
    """Return the error message for a mismatch of shapes."""
    return f"{name} has factors {tuple(down.shape)} and {tuple(up.shape)} for a weight of {tuple(weight.shape)}"
