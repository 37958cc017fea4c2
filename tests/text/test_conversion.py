"""Weights and folders: bit-exact round trips, what transformers makes of them, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.published import TEXT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from text.conversion import (
    flattened,
    kind_of,
    load_text_encoder,
    open_clip_to_transformers,
    read_text_encoder_config,
    save_text_encoder,
    text_encoder_config_json,
    text_encoder_from_weights,
    transformers_to_open_clip,
)
from text.encoder import OpenClipTextEncoder, TextEncoderConfig, TransformersTextEncoder, open_clip_text_cfg

TINY = TextEncoderConfig(
    width=32,
    layers=3,
    heads=4,
    intermediate_size=80,
    context_length=16,
    vocab_size=60,
    projection_dim=24,
    pad_id=0,
    bos_id=58,
    eos_id=59,
)
LAYER = "text_model.encoder.layers.0."
KEYS_OF_ONE_LAYER = [
    f"{LAYER}{module}.{kind}"
    for module in (
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
        "self_attn.k_proj",
        "self_attn.out_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    )
    for kind in ("bias", "weight")
]
KEYS = [
    "text_model.embeddings.position_embedding.weight",
    "text_model.embeddings.token_embedding.weight",
    *KEYS_OF_ONE_LAYER,
    "text_model.final_layer_norm.bias",
    "text_model.final_layer_norm.weight",
]
SD1_JSON = TEXT | {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
    "projection_dim": 768,
}  # fmt: skip


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def random_encoder(config: TextEncoderConfig) -> TransformersTextEncoder:
    encoder = TransformersTextEncoder(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    return encoder


def open_clip_model(config: TextEncoderConfig, form: str) -> Any:
    import open_clip

    return getattr(open_clip, form)(
        embed_dim=config.projection_dim,
        vision_cfg={"layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 16},
        text_cfg=open_clip_text_cfg(config),
        quick_gelu=config.activation == "quick_gelu",
    )


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def ids_for(config: TextEncoderConfig) -> Tensor:
    ids = torch.randint(1, 58, (4, config.context_length))
    ids[:, 0] = config.bos_id
    ids[torch.arange(4), torch.tensor([1, 5, 9, 15])] = config.eos_id
    return ids


@pytest.mark.parametrize("form", ["CLIP", "CustomTextCLIP"])
def test_round_trip_from_open_clip_is_exact(form: str) -> None:
    model = open_clip_model(TINY, form)
    weights = open_clip_to_transformers(model.state_dict())
    tower = model.text if form == "CustomTextCLIP" else model
    back = transformers_to_open_clip(weights)
    expected = {
        key: value
        for key, value in tower.state_dict().items()
        if not key.startswith(("visual.", "logit_", "text_projection"))
    }
    assert equal(back, expected)
    assert equal(open_clip_to_transformers(tower.state_dict()), weights)


def test_round_trip_from_transformers_is_exact_in_both_forms() -> None:
    flat = random_encoder(TINY).model.state_dict()
    prefixed = {"text_model." + key: value for key, value in flat.items()}
    old = {**prefixed, "text_model.embeddings.position_ids": torch.arange(16)[None]}
    for weights in (flat, prefixed, old):
        assert equal(open_clip_to_transformers(transformers_to_open_clip(weights)), prefixed)
        assert equal(flattened(weights), dict(flat))


def test_keys_are_the_ones_of_transformers_4_and_rows_are_q_k_v() -> None:
    config = replace(TINY, layers=1)
    weights = open_clip_model(config, "CLIP").state_dict()
    converted = open_clip_to_transformers(weights)
    assert sorted(converted) == KEYS
    rows = weights["transformer.resblocks.0.attn.in_proj_weight"]
    for i, name in enumerate("qkv"):
        assert torch.equal(converted[f"{LAYER}self_attn.{name}_proj.weight"], rows[32 * i : 32 * (i + 1)])


def test_refuses_weights_of_other_networks() -> None:
    theirs = open_clip_model(TINY, "CLIP").state_dict()
    with pytest.raises(ValueError, match=r"1 unexpected \(transformer.resblocks.0.ls_1.gamma\)"):
        open_clip_to_transformers({**theirs, "transformer.resblocks.0.ls_1.gamma": torch.ones(32)})
    ours = open_clip_to_transformers(theirs)
    with pytest.raises(ValueError, match=r"1 unexpected \(text_projection.weight\)"):
        transformers_to_open_clip({**ours, "text_projection.weight": torch.ones(2)})
    del ours[LAYER + "self_attn.k_proj.bias"]
    with pytest.raises(ValueError, match=r"1 missing \(encoder.layers.0.self_attn.k_proj.bias\)"):
        transformers_to_open_clip(ours)
    with pytest.raises(ValueError, match="twice"):
        flattened({"text_model.final_layer_norm.bias": torch.ones(2), "final_layer_norm.bias": torch.ones(2)})


@pytest.mark.parametrize("backend", ["transformers", "CLIP", "CustomTextCLIP"])
@torch.no_grad()
def test_saved_folder_loads_in_transformers_and_here(backend: str, tmp_path: Path) -> None:
    from transformers.models.clip.modeling_clip import CLIPTextModel

    if backend == "transformers":
        encoder = random_encoder(TINY)
    else:
        config = replace(TINY, vocab_size=49408, bos_id=49406, eos_id=49407)
        encoder = OpenClipTextEncoder(open_clip_model(config, backend))
    save_text_encoder(encoder, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert all(key.startswith("text_model.") for key in load_file(tmp_path / "model.safetensors"))
    ids = ids_for(encoder.config)
    expected, loaded = encoder(ids), load_text_encoder(tmp_path)
    assert loaded.config == encoder.config
    ours = loaded(ids)
    assert (ours.context - expected.context).abs().max() < (1e-9 if backend == "transformers" else 1e-5)
    assert (ours.pooled - expected.pooled).abs().max() < (1e-9 if backend == "transformers" else 1e-5)
    assert torch.equal(ours.mask, expected.mask)
    load: Any = CLIPTextModel.from_pretrained
    theirs, report = load(tmp_path, local_files_only=True, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    output = theirs(input_ids=ids)
    assert torch.equal(output.last_hidden_state, ours.context)
    assert torch.equal(output.pooler_output, ours.pooled)


@pytest.mark.parametrize("backend", ["transformers", "open_clip"])
@torch.no_grad()
def test_penultimate_is_shipped_without_the_last_layer(backend: str, tmp_path: Path) -> None:
    if backend == "transformers":
        encoder = random_encoder(replace(TINY, activation="gelu", hidden="penultimate"))
    else:
        config = replace(TINY, activation="gelu", vocab_size=49408, bos_id=49406, eos_id=49407)
        encoder = OpenClipTextEncoder(open_clip_model(config, "CLIP"), hidden="penultimate")
    save_text_encoder(encoder, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 2
    assert not any("layers.2." in key for key in load_file(tmp_path / "model.safetensors"))
    loaded, ids = load_text_encoder(tmp_path), ids_for(encoder.config)
    assert loaded.config == replace(encoder.config, layers=2, hidden="last")
    assert (loaded(ids).context - encoder(ids).context).abs().max() < 1e-5
    assert (loaded(ids).pooled - encoder(ids).pooled).abs().max() > 1e-3


@torch.no_grad()
def test_complete_tower_is_read_as_penultimate(tmp_path: Path) -> None:
    encoder = random_encoder(TINY)
    save_text_encoder(encoder, tmp_path)
    ids = ids_for(TINY)
    loaded = load_text_encoder(tmp_path, hidden="penultimate")
    states = encoder.model(input_ids=ids, output_hidden_states=True).hidden_states[-2]
    assert torch.equal(loaded(ids).context, encoder.model.final_layer_norm(states))
    assert torch.equal(loaded(ids).pooled, encoder(ids).pooled)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    encoder = random_encoder(TINY)
    save_text_encoder(encoder, tmp_path / "a")
    again = load_text_encoder(tmp_path / "a")
    assert isinstance(again, TransformersTextEncoder)
    save_text_encoder(again, tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_half_precision_files_are_loaded_as_float32(tmp_path: Path) -> None:
    encoder = random_encoder(TINY)
    save_text_encoder(encoder.half(), tmp_path)
    loaded = load_text_encoder(tmp_path)
    assert isinstance(loaded, TransformersTextEncoder)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert equal(dict(loaded.model.state_dict()), {k: v.float() for k, v in encoder.model.state_dict().items()})


def test_faults_in_the_weights_are_counted_and_five_are_shown() -> None:
    weights = random_encoder(TINY).model.state_dict()
    lost = sorted(key for key in weights if key.startswith("encoder.layers.1."))
    for key in lost:
        del weights[key]
    weights["final_layer_norm.bias"] = torch.ones(31)
    weights["encoder.layers.3.layer_norm1.bias"] = torch.ones(32)
    with pytest.raises(ValueError, match=r"16 missing.*1 unexpected.*1 of another shape") as caught:
        text_encoder_from_weights(TINY, weights)
    text = str(caught.value)
    assert [key for key in lost if key in text] == lost[:5] and ", ...);" in text
    assert "encoder.layers.3.layer_norm1.bias" in text and "final_layer_norm.bias (31,) for (32,)" in text


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(name: str, tmp_path: Path) -> None:
    save_text_encoder(random_encoder(TINY), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_text_encoder(tmp_path)


def test_spoiled_folders_are_refused_by_name(tmp_path: Path) -> None:
    save_text_encoder(random_encoder(TINY), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_text_encoder(tmp_path)
    save_file({"text_model.final_layer_norm.bias": torch.ones(32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{tmp_path}.*51 missing"):
        load_text_encoder(tmp_path)
    for spoiled in (b"{", b"\xff"):
        (tmp_path / "config.json").write_bytes(spoiled)
        with pytest.raises(ValueError, match="config.json is not JSON"):
            load_text_encoder(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load_text_encoder(tmp_path)


def test_config_json_is_what_transformers_understands() -> None:
    from transformers.models.clip.configuration_clip import CLIPTextConfig

    content = text_encoder_config_json(TINY)
    assert content["architectures"] == ["CLIPTextModel"] and content["model_type"] == "clip_text_model"
    theirs = CLIPTextConfig(**content).to_dict()
    assert {key: theirs[key] for key in content} == content
    assert (content["bos_token_id"], content["eos_token_id"], content["pad_token_id"]) == (58, 59, 0)
    assert theirs == random_encoder(TINY).model.config.to_dict() | {"architectures": ["CLIPTextModel"]}


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, activation="gelu", projection_dim=None),
        TextEncoderConfig(width=8, layers=1, heads=1, intermediate_size=9),
    ],
)
def test_config_json_round_trip(config: TextEncoderConfig) -> None:
    content = json.loads(json.dumps(text_encoder_config_json(config)))
    assert read_text_encoder_config(content) == config


def test_config_of_stable_diffusion_1_and_2() -> None:
    sizes = TextEncoderConfig(width=768, layers=12, heads=12, intermediate_size=3072, projection_dim=768)
    assert read_text_encoder_config(SD1_JSON) == sizes
    sd2 = {
        **SD1_JSON,
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    }
    assert read_text_encoder_config(sd2) == TextEncoderConfig(
        width=1024, layers=23, heads=16, intermediate_size=4096, activation="gelu"
    )
    assert read_text_encoder_config({**SD1_JSON, "vocab_size": 1000}).eos_id == 999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "t5"}, "'t5'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06"),
        ({"hidden_act": "relu"}, "activation='relu'"),
        ({"hidden_size": "768"}, "hidden_size.*'768'"),
        ({"num_hidden_layers": None}, "num_hidden_layers.*None"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"eos_token_id": [1, 2]}, "eos_token_id"),
        ({"num_attention_heads": 7}, "width=768 is not divisible by heads=7"),
    ],
)
def test_config_json_of_other_networks_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        content = {**SD1_JSON, **change}
        kind_of(content).read_config(content)
