"""LoRA files: what they do to weights, in which forms they are read and written, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ldm.denoisers import DiTConfig, UNetConfig, build_denoiser
from ldm.interop.compvis import unet_modules
from ldm.interop.files import write_weights
from ldm.interop.lora import LoraLayer, Part, merge_lora, read_lora, write_lora_diffusers, write_lora_kohya
from ldm.interop.tensors import open_weights
from text import TextEncoderConfig, TransformersTextEncoder

UNET = UNetConfig(
    block_out_channels=(16, 32), layers_per_block=1, attention_levels=(True, False), heads=2, norm_num_groups=8
)
LINEAR_UNET = UNetConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    attention_levels=(True, False),
    heads=2,
    norm_num_groups=8,
    use_linear_projection=True,
)
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
    denoiser = build_denoiser(config, latent_channels=4, context_width=16)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return Model(denoiser.eval(), TransformersTextEncoder(text).eval())


@pytest.fixture(scope="module")
def unet() -> Model:
    return build(UNET)


@pytest.fixture(scope="module")
def dit() -> Model:
    return build(DIT)


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


def read(model: Model, weights: dict[str, Tensor], metadata: dict[str, str] | None = None, **names: Any):
    return read_lora(weights, metadata or {}, **model._asdict(), source=SOURCE, **names)


def read_file(model: Model, path: Path) -> list[LoraLayer]:
    file = open_weights(path)
    return read_lora(file.tensors, file.metadata, **model._asdict(), source=path)


def merge(model: Model, layers: list[LoraLayer], strength: float = 1.0) -> Model:
    """Into a copy."""
    changed = model.copy()
    assert merge_lora(layers, **changed._asdict(), strength=strength) == len(layers)
    return changed


def same(one: list[LoraLayer], other: list[LoraLayer]) -> bool:
    """Bit for bit, in any order."""
    ours, theirs = ({(a.part, a.name): a for a in layers} for layers in (one, other))
    return ours.keys() == theirs.keys() and all(
        torch.equal(a.down, b.down) and torch.equal(a.up, b.up) and a.down.dtype == b.down.dtype and a.alpha == b.alpha
        for a, b in ((ours[place], theirs[place]) for place in ours)
    )


# ---- the merge


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
        (lambda m: LoraLayer("denoiser", "mid.foo", torch.ones(1, 2), torch.ones(2, 1), 1), "has no linear .* mid.foo"),
        (lambda m: LoraLayer("denoiser", FC1, torch.ones(1, 16), torch.ones(32, 1), 1), f"the denoiser has no .*{FC1}"),
        (
            lambda m: LoraLayer("denoiser", TO_K, torch.ones(1, 16), torch.ones(32, 1), 1),
            r"to_k has factors \(1, 16\) and \(32, 1\) for a weight of \(16, 16\)",
        ),
        (
            lambda m: layer(m, "denoiser", TO_K, alpha=1e39),
            r"by 1 changes .*to_k by up to .*e\+\d\d, more than float32",
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
        ((0, 8), (8, 0), 1.0, "of one rank"),
        ((4,), (8, 4), 1.0, "of one rank"),
        ((4, 8), (8, 4), math.inf, "layer a has alpha inf, expected a finite number"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(down: tuple[int, ...], up: tuple[int, ...], alpha: float, message: str):
    with pytest.raises(ValueError, match=message):
        LoraLayer("denoiser", "a", torch.zeros(down), torch.zeros(up), alpha)


# ---- the names

KOHYA, PEFT = (".lora_down.weight", ".lora_up.weight"), (".lora_A.weight", ".lora_B.weight")
LORA, LINEAR_LAYER = (
    (".lora.down.weight", ".lora.up.weight"),
    (
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
    ),
)
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
]


@pytest.mark.parametrize(("path", "endings", "part", "name"), FORMS, ids=[path + ends[0] for path, ends, *_ in FORMS])
@pytest.mark.parametrize("alpha", [None, torch.tensor(1.5), torch.tensor([1.5]).half(), torch.tensor(7)])
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


# ---- alpha by peft's settings


def settings(**values: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({key.replace("__", "."): value for key, value in values.items()})}


@pytest.mark.parametrize(
    ("metadata", "alphas"),
    [
        (settings(unet__r=4, unet__lora_alpha=8), (8, 8, 8)),
        (settings(unet__lora_alpha=8, unet__alpha_pattern={TO_K: 2}), (2, 8, 8)),
        (settings(unet__lora_alpha=8, unet__alpha_pattern={"to_k": 2, "attn2.to_k": 3}), (2, 2, 8)),
        (settings(unet__lora_alpha=8, unet__alpha_pattern={"attn2.to_k": 3, "to_k": 2}), (2, 3, 8)),
        (settings(unet__lora_alpha=8, unet__alpha_pattern={"^to_k": 2, f"^{CONV}": 5, "o_k": 6}), (8, 8, 5)),
        (settings(unet__lora_alpha=8, unet__r=9, unet__rank_pattern={"to_k": 4, "conv1": 4}), (8, 8, 8)),
        (settings(unet__lora_alpha=8, unet__use_rslora=True), (16, 16, 16)),  # alpha / sqrt(4) = 2 alpha / 4
        (settings(unet__lora_alpha=8, unet__use_rslora=True, unet__alpha_pattern={"conv1": 1}), (16, 16, 2)),
    ],
)
def test_alpha_is_what_pefts_settings_say(metadata: dict[str, str], alphas: tuple[float, ...], unet: Model):
    weights = {}
    for name in (TO_K, CROSS_K, CONV):
        down, up = factors(unet.module("denoiser", name).weight, 4)
        weights |= {f"unet.{name}{PEFT[0]}": down, f"unet.{name}{PEFT[1]}": up}
    assert tuple(found.alpha for found in read(unet, weights, metadata)) == alphas


def test_a_file_that_diffusers_wrote_is_read_with_its_settings(unet: Model, tmp_path: Path):
    from diffusers.loaders.lora_base import LoraBaseMixin

    layers = mixed_layers(unet)
    weights = {}
    for one in layers:
        path = f"unet.{one.name}" if one.part == "denoiser" else f"text_encoder.text_model.{one.name}"
        weights |= {path + PEFT[0]: one.down, path + PEFT[1]: one.up}
    content: dict[str, Any] = {}
    for part, prefix, inner in (("denoiser", "unet", ""), ("text_encoder", "text_encoder", "text_model.")):
        own = [one for one in layers if one.part == part]
        config = {
            "peft_type": "LORA",
            "init_lora_weights": True,
            "use_dora": False,
            "r": 99,
            "lora_alpha": 99,
            "rank_pattern": {inner + one.name: one.rank for one in own},
            "alpha_pattern": {inner + one.name: one.alpha for one in own},
        }
        content |= {f"{prefix}.{key}": value for key, value in config.items()}
    own_function: Any = None
    LoraBaseMixin.write_lora_layers(weights, str(tmp_path), True, "x.safetensors", own_function, True, content)
    assert same(read_file(unet, tmp_path / "x.safetensors"), layers)


def test_what_a_network_alone_wrote_has_settings_without_prefix(unet: Model):
    down, up = factors(unet.module("denoiser", TO_K).weight, 4)
    (found,) = read(unet, {TO_K + PEFT[0]: down, TO_K + PEFT[1]: up}, settings(r=4, lora_alpha=6))
    assert found.alpha == 6


def test_an_alpha_among_the_weights_counts_more_than_settings(unet: Model):
    down, up = factors(unet.module("denoiser", TO_K).weight, 4)
    weights = {f"unet.{TO_K}{PEFT[0]}": down, f"unet.{TO_K}{PEFT[1]}": up, f"unet.{TO_K}.alpha": torch.tensor(2.0)}
    assert read(unet, weights, settings(unet__lora_alpha=6))[0].alpha == 2


# ---- writing


def contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kohyas_form_passes_through_bit_for_bit(dtype: torch.dtype, unet: Model, tmp_path: Path):
    layers = [LoraLayer(a.part, a.name, a.down.to(dtype), a.up.to(dtype), a.alpha) for a in mixed_layers(unet)]
    write_lora_kohya(layers, tmp_path / "one.safetensors")
    again = read_file(unet, tmp_path / "one.safetensors")
    assert same(again, layers)
    write_lora_kohya(again, tmp_path / "two.safetensors")
    (first, said), (second, said_again) = contents(tmp_path / "one.safetensors"), contents(tmp_path / "two.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert said == said_again == {"format": "pt", "ss_network_module": "networks.lora"}
    down = first["lora_te_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight"]
    assert torch.equal(down, layers[-2].down) and down.dtype == dtype
    assert first["lora_unet_down_blocks_0_resnets_0_conv1.alpha"].item() == 16.0


def test_kohyas_metadata_tells_rank_and_alpha_if_there_is_one(unet: Model, tmp_path: Path):
    extra = {"ss_base_model_version": "sd_v1", "ss_network_module": "lycoris.kohya"}
    write_lora_kohya(some_layers(unet, rank=2, alpha=1.5), tmp_path / "x.safetensors", metadata=extra)
    assert contents(tmp_path / "x.safetensors")[1] == {
        "format": "pt",
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": "2",
        "ss_network_alpha": "1.5",
        "ss_base_model_version": "sd_v1",
    }


def test_pefts_form_passes_through_bit_for_bit(unet: Model, tmp_path: Path):
    layers = mixed_layers(unet)
    write_lora_diffusers(layers, tmp_path / "one.safetensors")
    again = read_file(unet, tmp_path / "one.safetensors")
    assert same(again, layers)
    write_lora_diffusers(again, tmp_path / "two.safetensors")
    (first, said), (second, said_again) = contents(tmp_path / "one.safetensors"), contents(tmp_path / "two.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert said == said_again
    assert {f"unet.{TO_K}.lora_A.weight", f"text_encoder.text_model.{FC1}.lora_B.weight"} <= first.keys()


def test_diffusers_finds_every_rank_and_alpha_in_its_form(unet: Model, tmp_path: Path):
    """By peft's rule for its settings: the first pattern that a module's path ends with, or the common number."""
    from diffusers.utils.state_dict_utils import _load_sft_state_dict_metadata

    layers = mixed_layers(unet)
    write_lora_diffusers(layers, tmp_path / "x.safetensors")
    said: Any = _load_sft_state_dict_metadata(str(tmp_path / "x.safetensors"))
    for one in layers:
        prefix = "unet." if one.part == "denoiser" else "text_encoder."
        own = {key.removeprefix(prefix): value for key, value in said.items() if key.startswith(prefix)}
        for full in (one.name, f"text_model.{one.name}") if one.part == "text_encoder" else (one.name,):
            found = [
                next((v for k, v in own[pattern].items() if re.match(rf"(.*\.)?({k})$", full)), own[rule])
                for rule, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern"))
            ]
            assert found == [one.rank, one.alpha]
            assert any(full == target or full.endswith(f".{target}") for target in own["target_modules"])


def test_kohyas_form_and_diffusers_form_merge_alike(unet: Model, tmp_path: Path):
    write_lora_kohya(mixed_layers(unet), tmp_path / "k.safetensors")
    read_first = read_file(unet, tmp_path / "k.safetensors")
    write_lora_diffusers(read_first, tmp_path / "d.safetensors")
    ways = [merge(unet, layers, 0.8) for layers in (read_first, read_file(unet, tmp_path / "d.safetensors"))]
    assert len(ways[0].differs(unet.weights())) == len(PLACES)
    assert not ways[0].differs(ways[1].weights())


def test_a_transformers_lora_is_written_under_its_folders_name(dit: Model, tmp_path: Path):
    layers = [layer(dit, "denoiser", "transformer_blocks.0.attn1.to_q", alpha=1.0)]
    write_lora_diffusers(layers, tmp_path / "x.safetensors", denoiser_prefix="transformer")
    assert "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight" in contents(tmp_path / "x.safetensors")[0]
    assert same(read_file(dit, tmp_path / "x.safetensors"), layers)


@pytest.mark.parametrize("write", [write_lora_kohya, write_lora_diffusers])
def test_what_cannot_be_written_leaves_no_file(write: Callable[..., None], unet: Model, tmp_path: Path):
    with pytest.raises(ValueError, match="a LoRA of no layers cannot be written"):
        write([], tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"layer {FC1} of the text_encoder is there 2 times"):
        write([*some_layers(unet), layer(unet, "text_encoder", FC1)], tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


# ---- what is refused

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
    "diff": ({f"{K}.diff": torch.ones(16, 16)}, r"whole differences of weights \(diff\)"),
    "diff_b": ({f"{K}.diff_b": torch.ones(16)}, "whole differences of weights"),
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
        ({}, "this is no LoRA, 0 tensors"),
        ({"model.diffusion_model.out.2.weight": torch.ones(4, 4)}, "no LoRA, 1 tensors .*, looks like a whole model:"),
        ({"emb_params": torch.ones(2, 768)}, "looks like words for a model"),
        ({"control_model.out.weight": torch.ones(4, 4)}, "looks like a ControlNet"),
        ({f"{TO_K}.weight": torch.ones(16, 16)}, rf"this is no LoRA, 1 tensors \({TO_K}.weight\): give a LoRA's file"),
    ],
)
def test_what_is_no_lora_at_all_is_refused(weights: dict[str, Tensor], message: str, unet: Model):
    assert re.search(message, refusal(unet, weights))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lora_adapter_metadata": "{half"}, "metadata lora_adapter_metadata is not JSON"),
        ({"lora_adapter_metadata": "[" * 100_000}, "metadata lora_adapter_metadata is not JSON"),
        ({"lora_adapter_metadata": "[1]"}, "does not hold a JSON object"),
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
        (settings(lora_alpha=8), f"tells the alpha of some layers, but not of unet.{TO_K}"),
        (settings(text_encoder__lora_alpha=8), f"tells the alpha of some layers, but not of unet.{TO_K}"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused(metadata: dict[str, str], message: str, unet: Model):
    weights = {f"unet.{TO_K}{PEFT[0]}": torch.ones(4, 16), f"unet.{TO_K}{PEFT[1]}": torch.ones(16, 4)}
    assert re.search(message, refusal(unet, weights, metadata))


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
