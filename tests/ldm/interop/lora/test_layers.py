"""What a LoRA does to weights: the formula, rounded once, and nothing else."""

from __future__ import annotations

import math
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
    read_file,
    some_layers,
)
from torch import nn

from ldm.interop.lora import LoraLayer, Part, merge_lora, write_lora_kohya
from ldm.interop.network_files import write_weights
from ldm.interop.weight_reader import open_weights


@pytest.mark.parametrize(("part", "name"), PLACES, ids=[name for _, name in PLACES])
def test_a_merge_is_the_formula_and_touches_nothing_else(part: Part, name: str, unet: Model):
    lora = layer(unet, part, name, rank=4, alpha=3.0)
    changed = merge(unet, [lora], strength=0.7)
    weight = unet.module(part, name).weight.double()
    product = torch.einsum("or,r...->o...", lora.up.double().flatten(1), lora.down.double())
    expected = weight + 0.7 * (3.0 / 4) * product
    assert (product.abs().max() > 1) and (changed.module(part, name).weight - expected).abs().max() < 1e-6
    assert changed.differs(unet.weights()) == {f"model.{name}.weight" if part == "text_encoder" else f"{name}.weight"}


@pytest.mark.parametrize(("part", "name"), PLACES, ids=[name for _, name in PLACES])
def test_a_merged_layer_computes_what_it_and_its_branch_did(part: Part, name: str, unet: Model):
    lora = layer(unet, part, name)
    module = unet.module(part, name)
    changed = merge(unet, [lora], strength=-1.5).module(part, name)
    torch.manual_seed(5)
    if isinstance(module, nn.Conv2d):
        geometry: Any = (module.kernel_size, module.stride, module.padding)
        down, up = nn.Conv2d(module.in_channels, 4, *geometry, bias=False), nn.Conv2d(4, len(lora.up), 1, bias=False)
        x = torch.randn(2, module.in_channels, 8, 8)
    else:
        down, up = nn.Linear(module.in_features, 4, bias=False), nn.Linear(4, module.out_features, bias=False)
        x = torch.randn(2, 5, module.in_features)
    with torch.no_grad():
        down.weight.copy_(lora.down)
        up.weight.copy_(lora.up)
        branch = -1.5 * (3.0 / 4) * up(down(x))
        assert branch.std() > 1 and (changed(x) - module(x) - branch).abs().max() < 1e-4


def test_several_add_up_in_any_order(unet: Model):
    one, other = some_layers(unet), [layer(unet, *place, rank=2, alpha=5.0, seed=99) for place in PLACES]
    forth = merge(merge(unet, one, 0.5), other, -2.0)
    back = merge(merge(unet, other, -2.0), one, 0.5)
    for part, name in PLACES:
        weights = [model.module(part, name).weight for model in (unet, merge(unet, one), merge(unet, other))]
        expected = weights[0] + 0.5 * (weights[1] - weights[0]) - 2.0 * (weights[2] - weights[0])
        for model in (forth, back):
            assert (model.module(part, name).weight - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_weight_keeps_its_precision_and_is_rounded_once(dtype: torch.dtype, unet: Model):
    changed, wide = unet.copy(), unet.copy()
    lora = some_layers(unet)
    for model, own in ((changed, dtype), (wide, torch.float64)):
        for part in model:
            part.to(dtype).to(own)
        merge_lora(lora, **model._asdict(), strength=0.3)
    for part, name in PLACES:
        weight, exact = (model.module(part, name).weight for model in (changed, wide))
        assert weight.dtype == dtype
        # The float32 of the change may turn the rounding of one weight in some thousands.
        assert (weight == exact.to(dtype)).float().mean() > 0.99
        assert (weight - exact).abs().max() <= (exact.abs() * torch.finfo(dtype).eps).max()


@pytest.mark.parametrize("strength", [math.nan, math.inf, -math.inf])
def test_a_strength_that_is_no_number_is_refused(strength: float, unet: Model):
    with pytest.raises(ValueError, match=f"the strength of a LoRA is {strength}, expected a finite number"):
        merge(unet, some_layers(unet), strength)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (
            lambda m: LoraLayer("denoiser", "mid.foo", torch.ones(1, 2), torch.ones(2, 1), 1),
            "has no linear, .* layer mid.foo",
        ),
        (lambda m: LoraLayer("denoiser", FC1, torch.ones(1, 16), torch.ones(32, 1), 1), f"the denoiser has no .*{FC1}"),
        (
            lambda m: LoraLayer("denoiser", TO_K, torch.ones(1, 16), torch.ones(32, 1), 1),
            r"to_k has factors \(1, 16\) and \(32, 1\) for a weight of \(16, 16\)",
        ),
        (
            lambda m: layer(m, "denoiser", TO_K, alpha=1e39),
            r"of strength 1 changes .*to_k by up to .*e\+\d\d, more than float32",
        ),
        (
            lambda m: LoraLayer("denoiser", TO_K, torch.full((1, 16), math.nan), torch.ones(16, 1), 1),
            "by up to nan, more than float32 holds",
        ),
    ],
)
def test_a_merge_that_fails_has_changed_nothing(last: Callable[[Model], LoraLayer], message: str, unet: Model):
    changed = unet.copy()
    with pytest.raises(ValueError, match=message):
        merge_lora([*some_layers(unet), last(unet)], **changed._asdict(), strength=1.0)
    assert not changed.differs(unet.weights())


@pytest.mark.parametrize(
    ("down", "up", "alpha", "message"),
    [
        ((4, 8), (8, 2), 1.0, r"down of shape \(4, 8\) and an up of \(8, 2\)"),
        ((0, 8), (8, 0), 1.0, "of the same rank"),
        ((4,), (8, 4), 1.0, "of the same rank"),
        ((4, 8), (8, 4), math.inf, "layer a has alpha inf, expected a finite number"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(down: tuple[int, ...], up: tuple[int, ...], alpha: float, message: str):
    with pytest.raises(ValueError, match=message):
        LoraLayer("denoiser", "a", torch.zeros(down), torch.zeros(up), alpha)


def test_a_file_is_merged_into_weights_that_lie_in_a_file(unet: Model, tmp_path: Path):
    """They are mapped, and the file must stay what it was."""
    model = unet.copy()
    write_weights(model.denoiser.state_dict(), tmp_path / "unet.safetensors")
    write_lora_kohya(some_layers(unet), tmp_path / "lora.safetensors")
    before = (tmp_path / "unet.safetensors").read_bytes()
    model.denoiser.load_state_dict(open_weights(tmp_path / "unet.safetensors").tensors, assign=True)
    merge_lora(read_file(model, tmp_path / "lora.safetensors"), **model._asdict(), strength=0.8)
    assert not model.differs(merge(unet, some_layers(unet), 0.8).weights())
    assert (tmp_path / "unet.safetensors").read_bytes() == before
