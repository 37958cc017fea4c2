"""Published folders, in miniature: each is read, written as a single file and back, and stays the same model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.published import MODELS, PIXART, TOKENIZER, published_folder, write
from safetensors.torch import load_file

from ldm import DrawRequest, TextToImage
from ldm.cli import run_command
from ldm.denoisers import DiTConfig
from ldm.export import arguments, main
from ldm.interop.diffusers_layout.denoiser import read_denoiser_config
from ldm.interop.read_back import PROMPTS
from ldm.interop.read_model import read_model

EVERY = pytest.mark.parametrize("name", MODELS)
Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    root = tmp_path_factory.mktemp("published")

    def made(name: str) -> Path:
        return root / name if (root / name).exists() else published_folder(name, root / name)

    return made


def export(*words: object) -> None:
    assert run_command(main, arguments(), [str(word) for word in words]) == 0


@EVERY
def test_prompts_are_encoded_as_transformers_does(folder: Folder, name: str):
    from transformers import CLIPTextModel, CLIPTokenizer

    place = folder(name)
    tokenizer = CLIPTokenizer.from_pretrained(place / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(place / "text_encoder").eval()
    (tower,) = read_model(place, dtype=torch.float32).model.conditioner.towers
    assert tower.tokenizer.config.pad_id == tokenizer.pad_token_id == (0 if MODELS[name].second else 49407)
    ids = tokenizer(list(PROMPTS), padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(tower.tokenizer(PROMPTS), ids)
    with torch.no_grad():
        expected = encoder(ids).last_hidden_state
        found = tower.encoder(ids).context
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@EVERY
def test_a_single_file_and_back_and_again(folder: Folder, name: str, tmp_path: Path):
    """The bytes of the weights stay the same, and so do text states and pictures."""
    one, back, two = tmp_path / "one.safetensors", tmp_path / "back", tmp_path / "two.safetensors"
    export(folder(name), one, "--format", "single-file")
    export(one, back)
    export(back, two, "--format", "single-file")
    assert digest(one) == digest(two)
    models = [TextToImage.load(path, device="cpu", dtype="fp32") for path in (folder(name), one, back, two)]
    first = models[0]
    for other in models[1:]:
        assert (other.model.path, other.model.prediction) == (first.model.path, first.model.prediction)
        assert other.native_size == first.native_size and other.parts.for_inpainting == first.parts.for_inpainting
        found, expected = (pipe.model.conditioner(PROMPTS).context for pipe in (other, first))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(drawing(other, name), drawing(first, name), atol=1e-6, rtol=1e-6)


def digest(file: Path) -> str:
    found = hashlib.sha256()
    for key, tensor in sorted(load_file(file).items()):
        found.update(key.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def drawing(pipe: TextToImage, name: str) -> torch.Tensor:
    from PIL import Image

    picture, mask = Image.new("RGB", (32, 32), "teal"), Image.new("L", (32, 32), 255)
    start: dict[str, Any] = {"image": picture, "mask": mask} if MODELS[name].inpainting else {}
    request = DrawRequest(prompt="a cat!", steps=3, scale=3.0, sampler="euler", seed=1, height=32, width=32, **start)
    return pipe.pixels(request)


def test_the_published_padding_is_stated_in_one_file_alone(folder: Folder):
    """Otherwise the tests above would not hold what they are for."""
    assert TOKENIZER["pad_token"] == "<|endoftext|>" and MODELS["2.1"].pad == "!"


def test_pixarts_transformer_is_read(tmp_path: Path):
    write(tmp_path / "config.json", PIXART)
    config, around = read_denoiser_config(tmp_path / "config.json")
    assert isinstance(config, DiTConfig)
    assert (config.depth, config.width, config.heads, config.patch_size, config.position_scale) == (28, 1152, 16, 2, 1)
    assert (around.sample_size, around.latent_channels, around.context_width) == (64, 4, 4096)
    assert around.learned_variance and not around.concat_channels
