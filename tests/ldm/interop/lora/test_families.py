"""Each family of changes merges as its formula says, which helpers.lora_families writes out in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.lora_families import FAMILIES, OF_KERNELS, Case
from helpers.loras import BLOCK, CONV, FC1, PROJ, Q_PROJ, TO_K, Model, layer, merge, read
from torch import Tensor

from ldm.interop.lora import LoraLayer, Part

FF, SHORTCUT, KERNEL = f"{BLOCK}.ff.net.2", "up_blocks.0.resnets.0.conv_shortcut", "up_blocks.0.resnets.0.conv1"
NORM, TEXT_NORM = "down_blocks.0.resnets.0.norm2", "encoder.layers.1.layer_norm1"
PLACES: list[tuple[Part, str]] = [
    *(("denoiser", name) for name in (TO_K, FF, PROJ, SHORTCUT, KERNEL)),
    ("text_encoder", FC1),
]


def kohyas(part: Part, name: str) -> str:
    flat = name.replace(".", "_")
    return f"lora_unet_{flat}" if part == "denoiser" else f"lora_te_text_model_{flat}"


def named(place: tuple[Part, str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {kohyas(*place) + ending: tensor for ending, tensor in tensors.items()}


def case_of(family: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    case: Case = (FAMILIES | OF_KERNELS)[family]
    return case(weight, torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES | OF_KERNELS)
def test_a_family_changes_weights_by_its_formula(family: str, unet: Model):
    places = PLACES if family in FAMILIES else [place for place in PLACES if place[1] == KERNEL]
    file: dict[str, Tensor] = {}
    changes: dict[tuple[Part, str], Tensor] = {}
    for place in places:
        tensors, changes[place] = case_of(family, unet.module(*place).weight.detach())
        assert changes[place].abs().max() > 0.01
        file |= named(place, tensors)
    layers = read(unet, file)
    for strength in (1.0, 0.6, -0.5):
        changed = merge(unet, layers, strength)
        for place, change in changes.items():
            expected = unet.module(*place).weight.double() + strength * change
            assert (changed.module(*place).weight - expected).abs().max() < 1e-6
        names = {f"model.{name}" if part == "text_encoder" else name for part, name in places}
        assert changed.differs(unet.weights()) == {f"{name}.weight" for name in names}
    assert not merge(unet, layers, 0.0).differs(unet.weights())


def test_all_families_may_be_in_one_file(unet: Model):
    """Each in another layer, as a trainer writes that trains attention with one and convolutions with another."""
    names = [name for name, _ in unet.denoiser.named_modules() if name.endswith(("to_q", "to_k", "to_v", "ff.net.2"))]
    weights, expected = {}, {}
    for family, name in zip(FAMILIES, names, strict=False):
        weight = unet.module("denoiser", name).weight.detach()
        tensors, change = case_of(family, weight)
        weights |= named(("denoiser", name), tensors)
        expected[name] = weight.double() + change
    assert len(expected) == min(len(names), len(FAMILIES)) > 10
    changed = merge(unet, read(unet, weights))
    for name, wanted in expected.items():
        assert (changed.module("denoiser", name).weight - wanted).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("place", "endings"),
    [
        (("denoiser", NORM), (".w_norm", ".b_norm")),
        (("denoiser", f"{BLOCK}.norm2"), (".w_norm", ".b_norm")),
        (("text_encoder", TEXT_NORM), (".w_norm", ".b_norm")),
        (("denoiser", NORM), (".diff", ".diff_b")),  # as ComfyUI writes every parameter
        (("denoiser", CONV), (".diff", ".diff_b")),
        (("text_encoder", Q_PROJ), (".diff", ".diff_b")),
    ],
)
def test_norms_and_biases_are_changed_by_their_differences(
    place: tuple[Part, str], endings: tuple[str, str], unet: Model
):
    module = unet.module(*place)
    weight, bias = torch.randn_like(module.weight), torch.randn_like(module.bias)
    changed = merge(unet, read(unet, named(place, dict(zip(endings, (weight, bias), strict=True)))), 0.6)
    assert torch.equal(changed.module(*place).weight, module.weight.detach().add(weight, alpha=0.6))
    assert torch.equal(changed.module(*place).bias, module.bias.detach().add(bias, alpha=0.6))


def test_a_bias_may_be_changed_alone_or_beside_a_lora(unet: Model):
    place: tuple[Part, str] = ("denoiser", CONV)
    lora, bias = layer(unet, *place), torch.randn_like(unet.module(*place).bias)
    factors = {".lora_down.weight": lora.down, ".lora_up.weight": lora.up, ".alpha": torch.tensor(lora.alpha)}
    alone = merge(unet, read(unet, named(place, {".diff_b": bias})))
    assert alone.differs(unet.weights()) == {f"{CONV}.bias"}
    both = merge(unet, read(unet, named(place, factors | {".diff_b": bias})))
    assert torch.equal(both.module(*place).bias, alone.module(*place).bias)
    assert torch.equal(both.module(*place).weight, merge(unet, [lora]).module(*place).weight)


def test_pefts_bias_of_the_second_factor_is_scaled_as_its_lora(unet: Model):
    place: tuple[Part, str] = ("denoiser", CONV)
    lora, bias = layer(unet, *place), torch.randn_like(unet.module(*place).bias)
    factors = {".lora_A.weight": lora.down, ".lora_B.weight": lora.up}
    tensors = factors | {".lora_B.bias": bias, ".alpha": torch.tensor(2.0)}
    changed = merge(unet, read(unet, {f"unet.{CONV}{ending}": tensor for ending, tensor in tensors.items()}), 0.5)
    expected = unet.module(*place).bias.double() + 0.5 * (2.0 / 4) * bias.double()
    assert (changed.module(*place).bias - expected).abs().max() < 1e-6


def test_a_zero_difference_of_a_bias_that_the_layer_lacks_is_nothing(unet: Model):
    place: tuple[Part, str] = ("denoiser", TO_K)
    assert unet.module(*place).bias is None
    layers = read(unet, named(place, {".diff": torch.ones(16, 16), ".diff_b": torch.zeros(16)}))
    assert merge(unet, layers).differs(unet.weights()) == {f"{TO_K}.weight"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_of_eight_bits_are_widened(dtype: torch.dtype, unet: Model):
    lora = layer(unet, "denoiser", TO_K)
    down, up = lora.down.to(dtype), lora.up.to(dtype)
    tensors = {".lora_down.weight": down, ".lora_up.weight": up, ".alpha": torch.tensor(lora.alpha)}
    wide = LoraLayer("denoiser", TO_K, down.float(), up.float(), lora.alpha)
    found = merge(unet, read(unet, named(("denoiser", TO_K), tensors)))
    assert not found.differs(merge(unet, [wide]).weights())


@pytest.mark.parametrize("family", ["LoHa", "LoKr of two matrices", "DoRA of outputs", "OFT", "GLoRA"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_families_are_computed_in_float32_and_rounded_once(family: str, dtype: torch.dtype, unet: Model):
    coarse = unet.copy()
    for part in coarse:
        part.to(dtype)
    weight = coarse.module("denoiser", TO_K).weight.detach()
    tensors, change = case_of(family, weight.float())
    found = merge(coarse, read(coarse, named(("denoiser", TO_K), tensors)), 0.7).module("denoiser", TO_K).weight
    exact = weight.double() + 0.7 * change
    assert found.dtype == dtype and (found == exact.to(dtype)).float().mean() > 0.99


def test_several_files_add_up_one_after_the_other(unet: Model):
    """DoRA is computed from the weight that the file before it left, as in ComfyUI."""
    weight = unet.module("denoiser", TO_K).weight.detach()
    tensors, change = case_of("LoRA", weight)
    first = merge(unet, read(unet, named(("denoiser", TO_K), tensors)), 0.5)
    between = first.module("denoiser", TO_K).weight.detach()
    assert (between - weight.double() - 0.5 * change).abs().max() < 1e-6
    tensors, change = case_of("DoRA of outputs", between)
    second = merge(first, read(first, named(("denoiser", TO_K), tensors)), 0.5)
    assert (second.module("denoiser", TO_K).weight - between.double() - 0.5 * change).abs().max() < 1e-6
