"""Models whose parts come from elsewhere: --vae for a file that has none, a U-Net alone, a text encoder of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stable_diffusion import stable_diffusion, states
from safetensors.torch import save_file
from torch import Tensor

from ldm import TextToImage
from ldm.interop.compvis.writing import single_file_tensors
from ldm.interop.diffusers_layout.folder import write_folder
from ldm.interop.read_model import LoadOptions, read_model
from ldm.model.components import ModelComponents
from text.conversion import transformers_to_open_clip

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
FP32: dict[str, Any] = {"dtype": torch.float32}


@pytest.fixture(scope="module")
def parts() -> ModelComponents:
    """As a file tells it: 8 heads, and latents of 64 x 64."""
    return stable_diffusion(1)


@pytest.fixture(scope="module")
def place(parts: ModelComponents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whole, in both layouts, and its parts."""
    place = tmp_path_factory.mktemp("parts")
    write_folder(parts, place / "whole", **FP32)
    tensors = {name: t.contiguous().clone() for name, t in single_file_tensors(parts).items()}
    save_file(tensors, place / "whole.safetensors")
    save_file(below(tensors, VAE, strip=True), place / "vae.safetensors")
    for name, prefixes in {"novae": (UNET, TEXT), "notext": (UNET, VAE), "unet": (UNET,)}.items():
        save_file({n: t for n, t in tensors.items() if n.startswith(prefixes)}, place / f"{name}.safetensors")
    return place


def below(tensors: dict[str, Tensor], prefix: str, *, strip: bool = False) -> dict[str, Tensor]:
    return {name.removeprefix(prefix) if strip else name: t for name, t in tensors.items() if name.startswith(prefix)}


def assert_same(found: Any, expected: Any) -> None:
    """All but a text encoder's last layer if it is not used, which a folder does not keep."""
    ours, theirs = states(found), states(expected)
    unused = theirs.keys() - ours.keys() if expected.config.use_linear_projection else set()
    assert ours.keys() == theirs.keys() - unused and len(unused) in (0, 16)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert found.config == expected.config and found.model.prediction == expected.model.prediction
    assert found.model.path == expected.model.path
    contexts = [own.model.conditioner(["a cat"]).context for own in (found, expected)]
    assert torch.equal(*contexts)
    z = torch.ones(1, 4, 1, 1)
    assert torch.equal(*(own.model.vae._latent_statistics(z)[0] for own in (found, expected)))
    torch.testing.assert_close(*(own.model.vae._latent_statistics(z)[1] for own in (found, expected)))


@pytest.mark.parametrize("vae", ["vae.safetensors", "whole", "whole/vae", "whole.safetensors"])
def test_a_file_without_an_autoencoder_takes_the_given_one(vae, parts, place):
    found = read_model(place / "novae.safetensors", LoadOptions(vae=place / vae), **FP32)
    assert_same(found, parts)
    assert f"autoencoder of {Path(vae).name}" in found.describe()


def text_alone(parts: ModelComponents) -> dict[str, Tensor]:
    encoder: Any = parts.model.conditioner.encoders[0]
    return {f"text_model.{name}": t.clone() for name, t in encoder.model.state_dict().items()}


TEXTS: dict[str, Callable[[ModelComponents], dict[str, Tensor]]] = {
    "transformers'": text_alone,
    "transformers', without prefix": lambda p: {n.removeprefix("text_model."): t for n, t in text_alone(p).items()},
    "in its place": lambda p: {f"{TEXT}transformer.{name}": t for name, t in text_alone(p).items()},
    "of ComfyUI": lambda p: text_alone(p) | {"logit_scale": torch.ones(()), "text_projection.weight": torch.eye(64)},
    "wrapped": lambda p: {f"module.{name}": t for name, t in text_alone(p).items()},
}  # fmt: skip


@pytest.mark.parametrize("form", TEXTS)
def test_a_text_encoder_alone_in_a_file(form, parts, place, tmp_path):
    save_file(TEXTS[form](parts), tmp_path / "text.safetensors")
    options = LoadOptions(text=tmp_path / "text.safetensors")
    assert_same(read_model(place / "notext.safetensors", options, **FP32), parts)


def test_a_text_encoder_under_openclips_names(tmp_path):
    second = stable_diffusion(2)
    write_folder(second, tmp_path / "whole", **FP32)
    save_file(
        {name: t.contiguous() for name, t in transformers_to_open_clip(text_alone(second)).items()},
        tmp_path / "open_clip.safetensors",
    )
    options = LoadOptions(text=tmp_path / "open_clip.safetensors")
    found = read_model(tmp_path / "whole", options, **FP32).model.conditioner
    assert torch.equal(found(["a cat"]).context, second.model.conditioner(["a cat"]).context)


@pytest.mark.parametrize("text", ["whole", "whole/text_encoder", "whole.safetensors"])
def test_a_text_encoder_of_another_model(text, parts, place):
    found = read_model(place / "notext.safetensors", LoadOptions(text=place / text), **FP32)
    assert_same(found, parts)
    assert f"text encoder of {Path(text).name}" in found.describe()


def diffusers_file(parts: ModelComponents, place: Path) -> Path:
    save_file({n: t.clone() for n, t in parts.denoiser.state_dict().items()}, place / "d.safetensors")
    return place / "d.safetensors"


def compvis_file(parts: ModelComponents, place: Path, *, before: str = "") -> Path:
    tensors = below({n: t.contiguous().clone() for n, t in single_file_tensors(parts).items()}, UNET, strip=True)
    save_file({before + name: t for name, t in tensors.items()}, place / "c.safetensors")
    return place / "c.safetensors"


def folder_alone(parts: ModelComponents, place: Path) -> Path:
    write_folder(parts, place / "m", **FP32)
    (place / "checkpoint-500").mkdir()
    (place / "m" / "unet").rename(place / "checkpoint-500" / "unet")
    return place / "checkpoint-500"


UNETS: dict[str, Callable[[ModelComponents, Path], Path]] = {
    "diffusers' names": diffusers_file,
    "CompVis's names": compvis_file,
    "CompVis's names in their place": lambda parts, place: compvis_file(parts, place, before=UNET),
    "CompVis's names, wrapped": lambda parts, place: compvis_file(parts, place, before="module."),
    "a trainer's attribute": lambda parts, place: compvis_file(parts, place, before="model."),
    "a checkpoint's folder": folder_alone,
    "the folder unet/": lambda parts, place: folder_alone(parts, place) / "unet",
}  # fmt: skip


@pytest.mark.parametrize("form", UNETS)
def test_a_unet_alone_with_its_parts_given(form, parts, place, tmp_path):
    unet = UNETS[form](parts, tmp_path)
    options = LoadOptions(vae=place / "vae.safetensors", text=place / "whole.safetensors")
    assert_same(read_model(unet, options, **FP32), parts)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("form", ["diffusers' names", "CompVis's names", "a checkpoint's folder"])
def test_for_inpainting_and_of_the_second_version(version, form, tmp_path):
    own = stable_diffusion(version, inpainting=True)
    write_folder(own, tmp_path / "whole", **FP32)
    options = LoadOptions(vae=tmp_path / "whole", text=tmp_path / "whole", prediction="v")
    (tmp_path / "other").mkdir()
    found = read_model(UNETS[form](own, tmp_path / "other"), options, **FP32)
    assert_same(found, replace(own, model=replace(own.model, prediction="v")))
    assert found.for_inpainting


def test_a_unet_folder_of_a_model_has_the_models_scheduler(tmp_path):
    own = stable_diffusion(1, prediction="v")
    write_folder(own, tmp_path / "whole", **FP32)
    options = LoadOptions(vae=tmp_path / "whole", text=tmp_path / "whole")
    assert read_model(tmp_path / "whole" / "unet", options, **FP32).model.prediction == "v"


LACKING = {
    "novae": ({}, r"novae\.safetensors has no autoencoder \(--vae, in Python vae=\): give such a part with the option"),
    "notext": ({}, r"has no text encoder \(--text, in Python text=\): give"),
    "unet": ({}, r"has no autoencoder \(--vae, in Python vae=\) and no text encoder \(--text, in Python text=\): give"),
    "unet with one": ({"vae": "vae.safetensors"}, r"has no text encoder \(--text, in Python text=\): give"),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_is_missing_is_named_with_its_option(name, place):
    given, told = LACKING[name]
    with pytest.raises(ValueError, match=told):
        TextToImage.load(place / f"{name.split()[0]}.safetensors", **{k: place / v for k, v in given.items()})


def test_a_folder_without_parts_names_them(parts, tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint-500 has no autoencoder .*--vae.* and no text encoder .*--text"):
        TextToImage.load(folder_alone(parts, tmp_path))


def test_parts_that_do_not_fit_are_named(place, tmp_path):
    write_folder(stable_diffusion(1), tmp_path / "m", **FP32)
    with pytest.raises(ValueError, match=r"vae has no text_encoder/: give a folder that holds"):
        TextToImage.load(tmp_path / "m", text=tmp_path / "m" / "vae")
    with pytest.raises(ValueError, match=r"its text encoder is not a CLIP"):
        TextToImage.load(tmp_path / "m", text=place / "vae.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no model at .*nothing"):
        TextToImage.load(tmp_path / "m", text=tmp_path / "nothing")


def test_an_autoencoder_that_is_replaced_may_be_damaged(parts, place, tmp_path):
    """Half precision overflows in it: a common reason to give another."""
    tensors = {name: t.contiguous().clone() for name, t in single_file_tensors(parts).items()}
    tensors[f"{VAE}decoder.conv_out.bias"].fill_(float("nan"))
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="holds NaN"):
        read_model(tmp_path / "m.safetensors", **FP32)
    assert_same(read_model(tmp_path / "m.safetensors", LoadOptions(vae=place / "whole"), **FP32), parts)


def test_the_parts_stand_in_the_pictures_record(place):
    from ldm import DrawRequest

    pipe = TextToImage.load(
        str(place / "unet.safetensors"), vae=str(place / "vae.safetensors"), text=str(place / "whole.safetensors")
    )
    (drawn,) = pipe.draw(DrawRequest(prompt="x", steps=1, seed=1, sampler="ddim", height=32, width=32))
    assert drawn.recipe.vae.split()[0] == "vae.safetensors" and len(drawn.recipe.vae.split()[1]) == 10
    assert drawn.recipe.text.split()[0] == "whole.safetensors" and len(drawn.recipe.text.split()[1]) == 10


def test_a_model_in_fp16_has_its_autoencoder_in_fp32_and_draws_nearly_the_same(place):
    """As on a GPU: `load` refuses fp16 on a CPU."""
    from ldm import DrawRequest

    request = DrawRequest(prompt="x", steps=2, seed=1, sampler="ddim", height=32, width=32)
    dtypes: dict[str, Any] = {"dtype": torch.float16, "vae_dtype": torch.float32}
    half = TextToImage(read_model(place / "whole", **dtypes), name="m")
    assert (half.precision, next(half.model.vae.parameters()).dtype) == ("fp16", torch.float32)
    assert next(half.model.conditioner.encoders[0].parameters()).dtype == torch.float16
    assert (half.pixels(request) - TextToImage.load(place / "whole").pixels(request)).abs().max() < 0.05
    with pytest.raises(ValueError, match="dtype is fp16, which is for GPUs"):
        TextToImage.load(place / "whole", dtype=torch.float16, device="cpu")
    from_file = read_model(place / "whole.safetensors", **dtypes)
    assert [next(network.parameters()).dtype for network in from_file.networks] == [
        torch.float16, torch.float32, torch.float16]  # fmt: skip


def test_what_is_saved_takes_its_precision_by_any_name(place, tmp_path):
    pipe = TextToImage.load(place / "whole", dtype="full")
    pipe.save(tmp_path / "a", dtype=torch.float16)
    pipe.save(tmp_path / "b", dtype="half")
    assert (tmp_path / "a/unet/diffusion_pytorch_model.safetensors").read_bytes() == (
        tmp_path / "b/unet/diffusion_pytorch_model.safetensors"
    ).read_bytes()
