"""Both backends against their own libraries' outputs and against each other; tiny networks with random
weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from text.conversion import text_encoder_from_weights, transformers_to_open_clip
from text.encoder import (
    Activation,
    Hidden,
    OpenClipTextEncoder,
    TextEncoderConfig,
    TransformersTextEncoder,
    open_clip_text_cfg,
)
from text.tokenizer import Tokenizer, TokenizerConfig

TINY = TextEncoderConfig(width=32, layers=3, heads=4, intermediate_size=80, projection_dim=24)
SD1 = replace(TINY, activation="quick_gelu", hidden="last", pad_id=49407)
SD2 = replace(TINY, activation="gelu", hidden="penultimate", pad_id=0)
STYLES = pytest.mark.parametrize("config", [SD1, SD2], ids=["sd1", "sd2"])
FORMS = pytest.mark.parametrize("form", ["CLIP", "CustomTextCLIP"])
CAPTIONS = ["a red apple", "", "a very long caption " * 30]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def token_ids(config: TextEncoderConfig) -> Tensor:
    return TOKENIZERS[config.pad_id](CAPTIONS)


TOKENIZERS = {pad_id: Tokenizer(TokenizerConfig(pad_id=pad_id)) for pad_id in (0, 49407)}


def randomize(module: nn.Module) -> None:
    """Also what starts as zeros or ones, so that no bias or norm can be mixed up unseen."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.add_(torch.randn(parameter.shape) * (0.02 if "embedding" in name else 0.2))


def open_clip_model(config: TextEncoderConfig, form: str, text_options: dict[str, Any] | None = None) -> Any:
    import open_clip

    model = getattr(open_clip, form)(
        embed_dim=config.projection_dim,
        vision_cfg={"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
        text_cfg={**open_clip_text_cfg(config), **(text_options or {})},
        quick_gelu=config.activation == "quick_gelu",
    )
    randomize(model)
    return model


def transformers_encoder(config: TextEncoderConfig) -> TransformersTextEncoder:
    encoder = TransformersTextEncoder(config)
    randomize(encoder)
    return encoder


@STYLES
def test_shapes_and_types(config: TextEncoderConfig) -> None:
    context, pooled, mask = transformers_encoder(config)(token_ids(config))
    assert context.shape == (3, 77, 32) and pooled.shape == (3, 32) and mask.shape == (3, 77)
    assert context.dtype == pooled.dtype == torch.float32 and mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [5, 2, 77]


@torch.no_grad()
def test_stable_diffusion_1_is_the_models_own_output() -> None:
    encoder = transformers_encoder(SD1)
    ids = token_ids(SD1)
    condition, own = encoder(ids), encoder.model(input_ids=ids)
    assert torch.equal(condition.context, own.last_hidden_state)
    assert torch.equal(condition.pooled, own.pooler_output)


@torch.no_grad()
def test_stable_diffusion_2_is_the_output_of_a_model_without_the_last_layer() -> None:
    from transformers.models.clip.modeling_clip import CLIPTextModel

    encoder = transformers_encoder(SD2)
    ids = token_ids(SD2)
    condition = encoder(ids)
    shorter = CLIPTextModel(type(encoder.model.config)(**{**encoder.model.config.to_dict(), "num_hidden_layers": 2}))
    shorter.load_state_dict(encoder.model.state_dict(), strict=False)
    assert torch.equal(condition.context, shorter(input_ids=ids).last_hidden_state)
    assert torch.equal(condition.pooled, encoder.model(input_ids=ids).pooler_output)
    assert not torch.allclose(condition.context, encoder.model(input_ids=ids).last_hidden_state, atol=1e-2)


@STYLES
@FORMS
@torch.no_grad()
def test_open_clip_encoder_gives_open_clips_own_output(config: TextEncoderConfig, form: str) -> None:
    model = open_clip_model(config, form)
    encoder = OpenClipTextEncoder(model, hidden=config.hidden, pad_id=config.pad_id)
    assert encoder.config == config
    ids = token_ids(config)
    condition = encoder(ids)
    tower = model.text if form == "CustomTextCLIP" else model
    assert torch.allclose(condition.pooled @ tower.text_projection, model.encode_text(ids), atol=1e-5)
    own = model.forward_intermediates(
        text=ids, text_indices=[2 if config.hidden == "last" else 1], normalize_intermediates=True
    )
    assert torch.allclose(condition.context, own["text_intermediates"][0], atol=1e-5)


@STYLES
@FORMS
@torch.no_grad()
def test_both_backends_agree(config: TextEncoderConfig, form: str) -> None:
    theirs = transformers_encoder(config)
    model = open_clip_model(config, form)
    tower = model.text if form == "CustomTextCLIP" else model
    rest = tower.load_state_dict(transformers_to_open_clip(theirs.model.state_dict()), strict=False)
    assert not rest.unexpected_keys
    ids = token_ids(config)
    a, b = theirs(ids), OpenClipTextEncoder(model, hidden=config.hidden, pad_id=config.pad_id)(ids)
    assert (a.context - b.context).abs().max() < 1e-5 and a.context.abs().max() > 1
    assert (a.pooled - b.pooled).abs().max() < 1e-5 and a.pooled.abs().max() > 1
    assert torch.equal(a.mask, b.mask)


@torch.no_grad()
def test_activation_and_hidden_change_the_context() -> None:
    encoder = transformers_encoder(SD1)
    ids, weights = token_ids(SD1), encoder.model.state_dict()
    context = encoder(ids).context
    other: list[dict[str, Any]] = [{"activation": "gelu"}, {"hidden": "penultimate"}]
    for change in other:
        changed = text_encoder_from_weights(replace(SD1, **change), weights)(ids).context
        assert (changed - context).abs().max() > 1e-3


@STYLES
@torch.no_grad()
def test_what_follows_the_eos_does_not_matter(config: TextEncoderConfig) -> None:
    for encoder in (transformers_encoder(config), OpenClipTextEncoder(open_clip_model(config, "CLIP"))):
        ids = token_ids(config)[:1]
        full, short = encoder(ids), encoder(ids[:, :9])
        assert torch.allclose(full.context[:, :9], short.context, atol=1e-5)
        assert torch.allclose(full.pooled, short.pooled, atol=1e-5)
        spoiled = encoder(torch.where(full.mask, ids, 7))
        assert torch.allclose(full.context[full.mask], spoiled.context[full.mask], atol=1e-5)
        assert torch.allclose(full.pooled, spoiled.pooled, atol=1e-5)
        assert torch.equal(full.mask, spoiled.mask)


def test_open_clip_encoder_shares_the_text_weights_and_leaves_the_image_tower() -> None:
    model = open_clip_model(SD1, "CLIP")
    encoder = OpenClipTextEncoder(model)
    names = {name for name, _ in encoder.named_parameters()}
    assert "positional_embedding" in names and not any(name.startswith(("visual", "text_proj")) for name in names)
    before = encoder(token_ids(SD1)).pooled.detach()
    with torch.no_grad():
        model.positional_embedding.add_(torch.randn_like(model.positional_embedding))
    assert (encoder(token_ids(SD1)).pooled - before).abs().max() > 1e-2


@STYLES
def test_gradients_reach_every_weight(config: TextEncoderConfig) -> None:
    for encoder in (
        transformers_encoder(config),
        OpenClipTextEncoder(open_clip_model(config, "CustomTextCLIP"), hidden=config.hidden),
    ):
        condition = encoder(token_ids(config))
        (condition.context.sin().sum() + condition.pooled.sin().sum()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.parametrize("width_mlp", [(32, 80), (98, 2), (98, 391)])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_open_clip_builds_the_tower_that_the_config_describes(
    width_mlp: tuple[int, int], activation: Activation
) -> None:
    width, intermediate = width_mlp
    config = TextEncoderConfig(
        width=width,
        layers=2,
        heads=2,
        intermediate_size=intermediate,
        context_length=16,
        vocab_size=49408,
        activation=activation,
        projection_dim=24,
        pad_id=0,
    )
    assert OpenClipTextEncoder(open_clip_model(config, "CustomTextCLIP")).config == config


@pytest.mark.parametrize(("options", "projection_dim"), [({"proj_bias": True}, 24), ({"proj_type": "none"}, None)])
def test_projection_width_is_read_off_the_tower(options: dict[str, Any], projection_dim: int | None) -> None:
    encoder = OpenClipTextEncoder(open_clip_model(SD1, "CustomTextCLIP", options), pad_id=49407)
    assert encoder.config == replace(SD1, projection_dim=projection_dim)


@pytest.mark.parametrize(
    "options",
    [
        {"embed_cls": True},
        {"no_causal_mask": True},
        {"ls_init_value": 0.1},
        {"qk_norm": True},
        {"act_kwargs": {"approximate": "tanh"}},
        {"norm_kwargs": {"eps": 1e-6}},
    ],
)
def test_refuses_towers_that_are_not_clips(options: dict[str, Any]) -> None:
    model = open_clip_model(SD2, "CustomTextCLIP", options)
    with pytest.raises(ValueError, match="this text tower"):
        OpenClipTextEncoder(model)


def test_refuses_other_modules() -> None:
    with pytest.raises(TypeError, match="Linear"):
        OpenClipTextEncoder(nn.Linear(2, 2))


@pytest.mark.parametrize("shape", [(77,), (1, 78), (1, 0), (1, 1, 77)])
def test_refuses_ids_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="token ids are"):
        TransformersTextEncoder(TINY)(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0}, "'width': 0"),
        ({"context_length": -1}, "'context_length': -1"),
        ({"heads": 5}, "width=32 is not divisible by heads=5"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"hidden": "first"}, "hidden='first'"),
        ({"hidden": "penultimate", "layers": 1}, "layers=1"),
        ({"vocab_size": 1000}, "'eos_id': 49407.*vocab_size=1000"),
        ({"pad_id": -1}, "'pad_id': -1"),
    ],
)
def test_config_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)


@pytest.mark.parametrize("hidden", ["last", "penultimate"])
def test_config_names_its_tokenizer(hidden: Hidden) -> None:
    config = replace(TINY, hidden=hidden, context_length=32, pad_id=0)
    assert config.tokenizer == TokenizerConfig(context_length=32, pad_id=0)
