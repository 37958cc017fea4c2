"""What changes no picture is named in one warning, and the LoRA is used: embeddings, idle tensors, odd metadata."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.loras import FC1, KOHYA, LINEAR_LAYER, TO_K, Model, merge, read, same, settings
from safetensors.torch import save_file
from torch import Tensor

from ldm.interop.lora import bundled_embeddings, lora_files, open_lora, read_lora

K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def good() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 16, generator=generator), torch.randn(16, 4, generator=generator)
    return {f"{K}{KOHYA[0]}": down, f"{K}{KOHYA[1]}": up, f"{K}.alpha": torch.tensor(2.0)}


BUNDLES: dict[str, tuple[dict[str, Tensor], dict[str, set[str]]]] = {
    "A1111's .pt": ({"bundle_emb.cat.string_to_param.*": torch.ones(2, 16)}, {"cat": {"string_to_param.*"}}),
    "A1111's .safetensors": ({"bundle_emb.cat.emb_params": torch.ones(2, 16)}, {"cat": {"emb_params"}}),
    "OneTrainer's": (
        {"bundle_emb.<cat>.clip_l": torch.ones(2, 16), "bundle_emb.<cat>.clip_l_out": torch.ones(2, 16)},
        {"<cat>": {"clip_l", "clip_l_out"}},
    ),
    "two, one with a dot": (
        {"bundle_emb.v1.5.string_to_param.*": torch.ones(1, 16), "bundle_emb.dog.emb_params": torch.ones(3, 16)},
        {"v1.5": {"string_to_param.*"}, "dog": {"emb_params"}},
    ),
}


@pytest.mark.parametrize("case", BUNDLES)
def test_embeddings_in_a_lora_are_set_apart(case: str, unet: Model):
    tensors, names = BUNDLES[case]
    everything = good() | tensors
    found = bundled_embeddings(everything)
    assert {name: set(keys) for name, keys in found.items()} == names
    assert all(
        torch.equal(one, tensors[f"bundle_emb.{name}.{key}"]) for name in found for key, one in found[name].items()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # who reads the embeddings knows of them
        assert same(read(unet, everything), read(unet, good()))
    assert not bundled_embeddings(good())


@pytest.mark.parametrize(
    "name",
    [
        "lora_te.logit_scale",
        "lora_te_logit_scale",
        "logit_scale",
        "global_step",
        "text_encoder.text_model.embeddings.position_ids",
        "lora_te_text_projection.lora_down.weight",
        "lora_te_text_projection.alpha",
        "text_encoder.text_projection.lora_A.weight",
        f"{TEXT}.alpha",  # of a layer whose factors were cut out
        f"{TEXT}.scalar",
    ],
)
def test_a_tensor_without_effect_is_named_once_and_ignored(name: str, unet: Model):
    with pytest.warns(UserWarning) as caught:
        found = read(unet, good() | {name: torch.ones(())})
    assert same(found, read(unet, good()))
    (message,) = [str(one.message) for one in caught]
    assert message == f"some/style.safetensors: 1 tensors ({name}) have no effect on pictures: ignored"


def test_many_tensors_without_effect_are_one_line(unet: Model):
    idle = {f"lora_te_text_model_encoder_layers_{i}_mlp_fc{k}.alpha": torch.ones(()) for i in range(9) for k in (1, 2)}
    with pytest.warns(UserWarning, match=r": 18 tensors \(.*, \.\.\.\) have no effect on pictures: ignored$") as caught:
        assert same(read(unet, good() | idle), read(unet, good()))
    assert len(caught) == 1


@pytest.mark.parametrize(
    "metadata",
    [
        {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo": "lora"}'},
        {"modelspec.architecture": "stable-diffusion-v1/lora", "sshs_model_hash": "0" * 64},
        {"ot_config": "{half", "ss_tag_frequency": "[" * 99},
        settings(unet__r=4, unet__lora_alpha=2, unet__future_key=[1], unet__peft_version="9", text_encoder__r=3),
    ],
)
def test_metadata_that_nobody_needs_is_ignored(metadata: dict[str, str], unet: Model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(read(unet, good(), metadata), read(unet, good()))


def folder_with(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        save_file(good(), tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("names", "used"),
    [
        (["pytorch_lora_weights.safetensors"], ["pytorch_lora_weights.safetensors"]),
        (["pytorch_lora_weights.safetensors", "other.safetensors"], ["pytorch_lora_weights.safetensors"]),
        (["adapter_model.safetensors"], ["adapter_model.safetensors"]),
        (["checkpoint-500/pytorch_lora_weights.safetensors", "style.safetensors"], ["style.safetensors"]),
        (["unet/adapter_model.safetensors"], ["unet/adapter_model.safetensors"]),
        (
            ["text_encoder/adapter_model.safetensors", "unet/adapter_model.safetensors"],
            ["unet/adapter_model.safetensors", "text_encoder/adapter_model.safetensors"],
        ),
    ],
)
def test_a_folders_usual_file_is_found(names: list[str], used: list[str], unet: Model, tmp_path: Path):
    folder = folder_with(tmp_path, *names)
    assert lora_files(folder) == [folder / name for name in used]
    for weights in open_lora(folder):
        assert same(read_lora(weights, **unet._asdict()), read(unet, good()))


def test_a_pickle_in_a_folder_is_found(unet: Model, tmp_path: Path):
    torch.save(good(), tmp_path / "pytorch_lora_weights.bin")
    (weights,) = open_lora(tmp_path)
    assert same(read_lora(weights, **unet._asdict()), read(unet, good()))


@pytest.mark.parametrize("names", [[], ["a.safetensors", "b.safetensors"], ["deep/down/adapter_model.safetensors"]])
def test_a_folder_without_a_clear_file_is_refused_with_its_remedy(names: list[str], unet: Model, tmp_path: Path):
    folder = folder_with(tmp_path, *names)
    count = sum("/" not in name for name in names)
    with pytest.raises(
        ValueError, match=rf"is a folder with {count} safetensors files and none .*: give the file itself"
    ):
        lora_files(folder)
    for name in names:  # the remedy
        assert lora_files(folder / name) == [folder / name]


def test_a_folder_that_diffusers_wrote_merges_as_its_file(unet: Model, tmp_path: Path):
    from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin

    down, up = torch.randn(4, 16), torch.randn(32, 4)
    text: Any = {f"text_model.{FC1}{end}": one for end, one in zip(LINEAR_LAYER, (down, up), strict=True)}
    attention: Any = {f"{TO_K}.lora_A.weight": torch.ones(2, 16), f"{TO_K}.lora_B.weight": torch.ones(16, 2)}
    StableDiffusionLoraLoaderMixin.save_lora_weights(tmp_path, attention, text)
    (weights,) = open_lora(tmp_path)
    merged = merge(unet, read_lora(weights, **unet._asdict()))
    change = merged.module("text_encoder", FC1).weight - unet.module("text_encoder", FC1).weight
    assert (change - up @ down).abs().max() < 1e-5
    change = merged.module("denoiser", TO_K).weight - unet.module("denoiser", TO_K).weight
    assert (change - 2).abs().max() < 1e-6


def test_a_damaged_adapter_config_is_named(tmp_path: Path):
    save_file({f"base_model.model.{TO_K}.lora_A.weight": torch.ones(2, 16)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{half")
    with pytest.raises(ValueError, match=r"adapter_config.json is not JSON \(.*\): copy it again"):
        list(open_lora(tmp_path))
