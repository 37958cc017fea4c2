"""What a LoRA file changes in a layer, and its merging into weights. Shapes: r rank, i inputs, o outputs, k kernel."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

Part = Literal["denoiser", "text_encoder"]
Parameter = Literal["weight", "bias"]
Adaptable = nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm
OLD_TEXT_PREFIX = "text_model."  # of the modules of CLIPTextModel before transformers 5.6


@dataclass(frozen=True, eq=False)
class LayerChange(ABC):
    """A change of one parameter of a layer: W <- W + strength * change(W).

    That is how every family is scaled. For all but DoRA, BOFT, and OFT with a rescaling, it equals what their own
    libraries do; for these it is A1111's and ComfyUI's interpolation, so that a strength of 0 changes nothing.
    """

    part: Part
    name: str  # path of the module, as in diffusers' networks and in CLIPTextModel, without `text_model.`
    parameter: Parameter = field(default="weight", kw_only=True)

    @abstractmethod
    def misfit(self, parameter: Tensor) -> str:
        """Describe why the change does not fit a parameter of this shape; "" if it fits. Reads no values."""

    @abstractmethod
    def change(self, parameter: Tensor) -> Tensor:
        """Compute the change at strength 1, in the parameter's shape, float32."""

    def largest(self, parameter: Tensor) -> float:
        """Return an upper bound on the absolute values of the change; infinity or NaN if it has them."""
        return self.change(parameter).abs().max().item()


@dataclass(frozen=True, eq=False)
class LoraLayer(LayerChange):
    """A change of one layer's weight: alpha / rank * up @ down.

    For a linear layer down is r x i, up o x r; for a convolution r x i x k x k and o x r x 1 x 1. Raises ValueError,
    naming the layer, if the ranks differ or alpha is not finite.
    """

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

    def misfit(self, parameter: Tensor) -> str:
        down, up = tuple(self.down.shape), tuple(self.up.shape)
        if (down, up) == factor_shapes(parameter, self.rank):
            return ""
        return f"{self.name} has factors {down} and {up} for a weight of {tuple(parameter.shape)}"

    def change(self, parameter: Tensor) -> Tensor:
        down = self.down.to(parameter.device, torch.float32).flatten(1)  # r, i * k * k
        up = self.up.to(parameter.device, torch.float32).flatten(1)  # o, r
        return (up @ down).mul_(self.alpha / self.rank).unflatten(1, self.down.shape[1:])

    def largest(self, parameter: Tensor) -> float:
        return abs(self.alpha) * self.up.abs().max().item() * self.down.abs().max().item()


def adaptable_layers(denoiser: nn.Module, text_encoder: nn.Module) -> dict[tuple[Part, str], Adaptable]:
    """Collect the layers of a denoiser and a TransformersTextEncoder that a file may change, by part and name."""
    parts: dict[Part, nn.Module] = {"denoiser": denoiser, "text_encoder": text_encoder.get_submodule("model")}
    return {
        (part, name.removeprefix(OLD_TEXT_PREFIX) if part == "text_encoder" else name): module
        for part, network in parts.items()
        for name, module in network.named_modules()
        if isinstance(module, Adaptable) and isinstance(module.weight, Tensor)  # some norms have no weight
    }


def factor_shapes(weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of down and up, for a layer's weight o x i or o x i x k x k."""
    outputs, *others = weight.shape
    return (rank, *others), (outputs, rank, *[1] * (len(others) - 1))


def as_matrix(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a 1 x 1 convolution as that of a matrix, others as they are."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


@torch.no_grad()
def merge_lora(layers: Sequence[LayerChange], *, denoiser: nn.Module, text_encoder: nn.Module, strength: float) -> int:
    """Add the changes: W <- W + strength * change(W), in float32, rounded once. Returns their count.

    Raises ValueError, before any parameter is changed, if the strength is not finite, a layer does not belong to the
    model, or a parameter could overflow its precision.
    """
    if not math.isfinite(strength):
        raise ValueError(f"the strength of a LoRA is {strength}, expected a finite number")
    modules = adaptable_layers(denoiser, text_encoder)
    parameters = [_parameter(layer, modules, strength) for layer in layers]
    for layer, parameter in zip(layers, parameters, strict=True):
        parameter.add_(layer.change(parameter), alpha=strength)
    return len(parameters)


def _parameter(layer: LayerChange, modules: Mapping[tuple[Part, str], Adaptable], strength: float) -> Tensor:
    """Find the parameter that a layer changes, and check that the change fits."""
    module = modules.get((layer.part, layer.name))
    parameter = None if module is None else getattr(module, layer.parameter)
    if parameter is None:
        missing = f"bias in its layer {layer.name}" if module else f"linear, convolutional or norm layer {layer.name}"
        raise ValueError(f"the {layer.part} has no {missing}: give the model of this LoRA")
    if reason := layer.misfit(parameter):
        raise ValueError(f"{reason}: give the model of this LoRA")
    largest = abs(strength) * layer.largest(parameter)
    if not largest <= torch.finfo(parameter.dtype).max:
        raise ValueError(
            f"a LoRA of strength {strength:g} changes {layer.name} by up to {largest:g}, more than "
            f"{str(parameter.dtype).removeprefix('torch.')} holds: lower the strength, or get the file again"
        )
    return parameter
