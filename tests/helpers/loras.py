"""Tiny models and LoRAs of random numbers for them, for the tests of ldm.interop.lora."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.denoisers import DiTConfig, UNetConfig
from ldm.interop.lora import LayerChange, LoraLayer, Part, merge_lora, read_lora
from ldm.interop.weight_reader import Weights, open_weights
from text import TextEncoderConfig, TransformersTextEncoder

UNET = UNetConfig(
    block_out_channels=(16, 32), layers_per_block=1, attention_levels=(True, False), heads=2, norm_num_groups=8
)
LINEAR_UNET = replace(UNET, use_linear_projection=True)
DIT = DiTConfig(depth=2, width=32, heads=2, sample_size=8)
SOURCE = Path("some/style.safetensors")

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
TO_K, CROSS_K, TO_OUT, FF = (f"{BLOCK}.{name}" for name in ("attn1.to_k", "attn2.to_k", "attn1.to_out.0", "ff.net.2"))
PROJ, CONV, STRIDED = (
    "mid_block.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.downsamplers.0.conv",
)
Q_PROJ, FC1 = "encoder.layers.1.self_attn.q_proj", "encoder.layers.0.mlp.fc1"
PLACES: list[tuple[Part, str]] = [
    *(("denoiser", name) for name in (TO_K, TO_OUT, FF, PROJ, CONV, STRIDED)),
    *(("text_encoder", name) for name in (Q_PROJ, FC1)),
]


ODD = torch.tensor(2.7).item()  # an alpha that half precision would round


class Model(NamedTuple):
    denoiser: nn.Module
    text_encoder: TransformersTextEncoder

    def copy(self) -> Model:
        return copy.deepcopy(self)

    def module(self, part: Part, name: str) -> Any:
        return (self.denoiser if part == "denoiser" else self.text_encoder.model).get_submodule(name)

    def weights(self) -> dict[str, Tensor]:
        named = {f"{i}.{name}": tensor for i, part in enumerate(self) for name, tensor in part.state_dict().items()}
        return {name: tensor.clone() for name, tensor in named.items()}

    def differs(self, before: dict[str, Tensor]) -> set[str]:
        after = self.weights()
        return {name.partition(".")[2] for name in before if not torch.equal(before[name], after[name])}


def build(config: UNetConfig | DiTConfig) -> Model:
    torch.manual_seed(0)
    text = TextEncoderConfig(width=16, layers=2, heads=2, intermediate_size=32, projection_dim=16)
    denoiser = config.build(latent_channels=4, context_width=16)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Model(denoiser.eval(), TransformersTextEncoder(text).eval())


def factors(weight: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random, of the shapes that trainers give to a layer with this weight."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *weight.shape[1:], generator=generator)
    return down, torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2), generator=generator)


def layer(model: Model, part: Part, name: str, *, rank: int = 4, alpha: float = 3.0, seed: int = 0) -> LoraLayer:
    return LoraLayer(part, name, *factors(model.module(part, name).weight, rank, seed), alpha)


def some_layers(model: Model, **sizes: Any) -> list[LoraLayer]:
    return [layer(model, part, name, seed=seed, **sizes) for seed, (part, name) in enumerate(PLACES)]


def mixed_layers(model: Model) -> list[LoraLayer]:
    """Of several ranks and alphas."""
    numbers = [(4, 3.0), (2, 1.0), (4, 0.5), (4, 3.0), (3, 16.0), (4, 3.0), (2, ODD), (2, 0.25)]
    return [
        layer(model, part, name, rank=rank, alpha=alpha, seed=seed)
        for seed, ((part, name), (rank, alpha)) in enumerate(zip(PLACES, numbers, strict=True))
    ]


def read(
    model: Model, weights: dict[str, Tensor], metadata: dict[str, str] | None = None, **names: Any
) -> list[Any]:  # LoraLayer, or another family's
    opened = Weights((SOURCE,), weights, lambda: weights, metadata or {})
    return read_lora(opened, **model._asdict(), **names)


def read_file(model: Model, path: Path) -> list[Any]:
    return read_lora(open_weights(path), **model._asdict())


def merge(model: Model, layers: Sequence[LayerChange], strength: float = 1.0) -> Model:
    """Into a copy."""
    changed = model.copy()
    assert merge_lora(layers, **changed._asdict(), strength=strength) == len(layers)
    return changed


def same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Bit for bit, in any order."""
    ours, theirs = ({(a.part, a.name): a for a in layers} for layers in (one, other))
    return ours.keys() == theirs.keys() and all(
        torch.equal(a.down, b.down) and torch.equal(a.up, b.up) and a.down.dtype == b.down.dtype and a.alpha == b.alpha
        for a, b in ((ours[place], theirs[place]) for place in ours)
    )


KOHYA, PEFT = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")


LORA, LINEAR_LAYER = (
    (".lora.down.weight", ".lora.up.weight"),
    (
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
    ),
)


def settings(**values: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({key.replace("__", "."): value for key, value in values.items()})}
