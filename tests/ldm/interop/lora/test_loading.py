"""LoRAs given to a model that is loaded: files and folders, of several families, with what they bring along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stable_diffusion import stable_diffusion
from safetensors.torch import save_file
from torch import Tensor

from ldm import TextToImage
from ldm.files.digest import short_hash
from ldm.inference.recipe import recorded
from ldm.interop.diffusers_layout.folder import write_folder
from ldm.interop.read_model import LoadOptions

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
COMPVIS = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_folder(stable_diffusion(1), folder, dtype=torch.float32)
    return folder


def weight(folder: Path, *loras: tuple[Path, float]) -> Tensor:
    return TextToImage.load(folder, lora=list(loras), device="cpu", dtype="fp32").denoiser.get_parameter(f"{Q}.weight")


def factors(model: Path) -> tuple[Tensor, Tensor]:
    outputs, inputs = weight(model).shape
    generator = torch.Generator().manual_seed(0)
    return 0.3 * torch.randn(2, inputs, generator=generator), 0.3 * torch.randn(outputs, 2, generator=generator)


@pytest.mark.parametrize(
    ("down", "up", "extra"),
    [
        (
            f"lora_unet_{Q.replace('.', '_')}.lora_down.weight",
            f"lora_unet_{Q.replace('.', '_')}.lora_up.weight",
            "bundle",
        ),
        (f"lycoris_{Q.replace('.', '_')}.lora_down.weight", f"lycoris_{Q.replace('.', '_')}.lora_up.weight", ""),
        (f"diffusion_model.{COMPVIS}.lora_A.weight", f"diffusion_model.{COMPVIS}.lora_B.weight", ""),
        (f"unet.{Q}.lora_A.default.weight", f"unet.{Q}.lora_B.default.weight", "bundle"),
    ],
)
def test_names_of_other_programs_are_understood(down: str, up: str, extra: str, model: Path, tmp_path: Path):
    a, b = factors(model)
    bundle = {"bundle_emb.cat.string_to_param.*": torch.ones(1, 64)} if extra else {}
    save_file({down: a, up: b, **bundle}, tmp_path / "x.safetensors")
    pipe = TextToImage.load(model, lora=[(tmp_path / "x.safetensors", 0.5)], device="cpu", dtype="fp32")
    found = pipe.denoiser.get_parameter(f"{Q}.weight")
    assert (found - weight(model) - 0.5 * b @ a).abs().max() < 1e-6
    assert [one.name for one in pipe.model.conditioner.embeddings_in(["a cat"])] == ["cat"] * bool(extra)


def bundle_file(model: Path, folder: Path, name: str, tensors: dict[str, Tensor]) -> Path:
    """A LoRA that changes nothing and brings an embedding."""
    a, b = factors(model)
    words = {f"bundle_emb.{name}.{key}": tensor for key, tensor in tensors.items()}
    layer = f"lora_unet_{Q.replace('.', '_')}"
    content = {f"{layer}.lora_down.weight": 0 * a, f"{layer}.lora_up.weight": b}
    save_file(content | words, folder / "bundle.safetensors")
    return folder / "bundle.safetensors"


def test_an_embedding_in_a_lora_is_used_by_its_name_as_one_of_its_own_file(model: Path, tmp_path: Path):
    vectors = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    lora = bundle_file(model, tmp_path, "toy", {"emb_params": vectors})
    save_file({"emb_params": vectors}, tmp_path / "toy.safetensors")
    save_file({"emb_params": -vectors}, tmp_path / "other.safetensors")
    given: list[dict[str, Any]] = [
        {"lora": [(lora, 1.0)]},
        {"embeddings": [tmp_path / "toy.safetensors"]},
        {"lora": [(lora, 1.0)], "embeddings": [(tmp_path / "other.safetensors", "toy")]},
        {},
    ]
    pipes = [TextToImage.load(model, device="cpu", dtype="fp32", **options) for options in given]
    states = [pipe.model.conditioner(["a toy"]).context for pipe in pipes]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])  # one that is given by name comes first
    assert not torch.equal(states[0], states[3])


def test_a_tag_does_not_add_what_its_lora_brings(model: Path, tmp_path: Path):
    bundle_file(model, tmp_path, "toy", {"emb_params": torch.ones(1, 64)})
    pipe = TextToImage.load(model, lora_folders=[tmp_path], device="cpu", dtype="fp32")
    with pytest.warns(UserWarning, match=r"bundle.safetensors brings embeddings, .* with --lora to use them: toy"):
        pipe("a toy <lora:bundle:1>", steps=1, n=1)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"emb_params": torch.ones(2, 32)}, "vectors of width 32, expected 64"),
        ({"clip_l": torch.ones(1, 64), "clip_g": torch.ones(1, 80)}, "embedding for SDXL"),
        ({"clip_l": torch.ones(1, 64), "clip_l_out": torch.ones(1, 64)}, "clip_l_out of the embedding toy"),
    ],
)
def test_what_a_bundled_embedding_lacks_is_one_warning(model: Path, tmp_path: Path, tensors, told: str):
    with pytest.warns(UserWarning, match=told) as caught:
        pipe = TextToImage.load(model, lora=[(bundle_file(model, tmp_path, "toy", tensors), 1.0)], device="cpu")
    assert len(caught) == 1
    assert [one.name for one in pipe.model.conditioner.embeddings_in(["toy"])] == ["toy"] * ("clip_l_out" in told)


def test_a_folder_of_peft_is_given_and_recorded(model: Path, tmp_path: Path):
    a, b = factors(model)
    folder = tmp_path / "style"
    folder.mkdir()
    tensors = {f"base_model.model.{Q}.lora_A.weight": a, f"base_model.model.{Q}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    assert (weight(model, (folder, 0.5)) - weight(model) - 0.5 * (6 / 2) * b @ a).abs().max() < 1e-6
    hashed = short_hash([folder / "adapter_model.safetensors"])
    assert recorded(LoadOptions(lora=[(folder, 0.5)]))["loras"] == f"style:0.5 {hashed}"


def test_of_a_folder_with_two_networks_nothing_is_merged_if_one_is_foreign(model: Path, tmp_path: Path):
    a, b = factors(model)
    for part, name in (("unet", Q), ("text_encoder", "encoder.layers.99.mlp.fc1")):
        (tmp_path / part).mkdir()
        tensors = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
        save_file(tensors, tmp_path / part / "adapter_model.safetensors")
        (tmp_path / part / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2}))
    with pytest.raises(
        ValueError, match="text_encoder/adapter_model.safetensors: this LoRA was made for another model"
    ):
        weight(model, (tmp_path, 1.0))


def test_a_folder_without_a_lora_is_refused_in_one_line(model: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="is a folder with 0 safetensors files .*: give the file itself"):
        weight(model, (tmp_path, 1.0))
