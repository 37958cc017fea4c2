"""A model as a folder in diffusers' layout: read as data, with nothing in it executed; written for everybody."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.diffusion import Prediction
from ldm.interop.denoiser import denoiser_folder, load_denoiser, save_denoiser
from ldm.interop.files import check_no_code, read_json, write_json
from ldm.interop.parts import Origin, Parts, check_parts_fit, denoiser_channels
from ldm.interop.scheduler import read_scheduler, scheduler_config_json
from ldm.interop.tensors import Weights, describe
from ldm.interop.vae import folded, load_vae, save_vae
from ldm.interop.weight_files import TEXT_STEM, WEIGHTS_STEM, find_weights
from ldm.latent_diffusion import LatentDiffusion
from ldm.whole import whole_folder
from text import (
    OpenClipTextEncoder,
    TransformersTextEncoder,
    flattened,
    load_text_encoder,
    load_tokenizer,
    save_text_encoder,
    save_tokenizer,
)

NOTES = "foundry.yaml"
INDEX = "model_index.json"
# What a model_index.json may name: diffusers' own classes, as far as they are read, or not needed, here.
PIPELINES = {
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline",
}  # fmt: skip
LIBRARIES = {"diffusers", "transformers", "stable_diffusion", None}


def read_folder(folder: Path, *, dtype: torch.dtype, prediction: Prediction | None = None) -> Parts:
    """A model in this precision, on the CPU. prediction: in place of what the scheduler's config says.

    Raises ValueError or FileNotFoundError, naming the file, for anything missing, cut short or something else.
    """
    check_index(folder)
    part = _denoiser_part(folder)
    text_weights = find_weights(folder / "text_encoder", TEXT_STEM).changed(flattened)
    # The text encoder first: what is mapped of its files is let go before the larger parts come.
    text_encoder = load_text_encoder(folder / "text_encoder", weights=text_weights.read(dtype), dtype=dtype)
    tokenizer = load_tokenizer(folder / "tokenizer")
    vae = load_vae(folder / "vae", dtype=dtype)
    loaded = load_denoiser(folder / part, dtype=dtype)
    check_parts_fit(loaded, vae, text_encoder, tokenizer, source=folder)
    path, told = read_scheduler(folder / "scheduler" / "scheduler_config.json")
    weights = find_weights(folder / part, WEIGHTS_STEM)
    model = LatentDiffusion(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        path=path,
        prediction=prediction or told,
        learned_variance=loaded.learned_variance,
    )
    scheduler_config_json(path, model.prediction)  # raises for a prediction that this path does not have
    notes = folder / NOTES
    return Parts(
        model=model,
        denoiser=loaded.network,
        config=loaded.config,
        sample_size=loaded.sample_size,
        notes=notes.read_text(encoding="utf-8") if notes.is_file() else "",
        origin=Origin(files=weights.files, precision=_precision(weights, text_weights, folder)),
    )


def check_index(folder: Path) -> None:
    """Raise ValueError if model_index.json, where there is one, asks for classes that are not diffusers' own."""
    index = folder / INDEX
    if not index.exists():
        return
    content = read_json(index)
    check_no_code(content, source=index)
    pipeline = content.get("_class_name", "StableDiffusionPipeline")
    if pipeline not in PIPELINES:
        raise ValueError(f"{index} asks for a {pipeline!r}, expected one of {', '.join(sorted(PIPELINES))}")
    for name, value in content.items():
        if isinstance(value, list) and (len(value) != 2 or value[0] not in LIBRARIES):
            raise ValueError(f"{index} asks for {name} of {value!r}: refused; only diffusers' own classes are read")


def _denoiser_part(folder: Path) -> str:
    parts = [name for name in ("transformer", "unet") if (folder / name).is_dir()]
    if len(parts) != 1:
        found = sorted(entry.name for entry in folder.iterdir())[:8]
        raise ValueError(f"{folder} holds {found}, expected unet/ or transformer/: this is not a text-to-image model")
    return parts[0]


def _precision(weights: Weights, text_weights: Weights, folder: Path) -> str:
    all_tensors: dict[str, torch.Tensor] = {}
    for name, part in (
        ("denoiser", weights),
        ("text", text_weights),
        ("vae", find_weights(folder / "vae", WEIGHTS_STEM)),
    ):
        all_tensors |= {f"{name}.{key}": tensor for key, tensor in part.tensors.items()}
    return describe(all_tensors)


def write_folder(parts: Parts, folder: Path, *, dtype: torch.dtype, beside: Mapping[str, bytes] | None = None) -> None:
    """Write the whole folder; an older export there is replaced when the new one is whole.

    beside: further files, by their path in the folder, as a model card. Raises ValueError if the folder exists and is
    no export: nothing else is ever deleted.
    """
    check_target(folder)
    with whole_folder(folder) as whole:
        write_parts(parts, whole, dtype=dtype)
        for name, content in (beside or {}).items():
            (whole / name).parent.mkdir(exist_ok=True)
            (whole / name).write_bytes(content)


def write_parts(parts: Parts, folder: Path, *, dtype: torch.dtype) -> None:
    """The same into a folder that is there."""
    model, encoder = parts.model, parts.model.text_encoder
    assert isinstance(encoder, OpenClipTextEncoder | TransformersTextEncoder)
    part = denoiser_folder(parts.config)
    save_denoiser(
        parts.denoiser,
        parts.config,
        folder / part,
        sample_size=parts.sample_size,
        in_channels=denoiser_channels(parts.denoiser),
        latent_channels=model.vae.config.latent_channels,
        context_width=encoder.config.width,
        learned_variance=model.learned_variance,
        dtype=dtype,
    )
    save_vae(folded(model.vae), folder / "vae", dtype=dtype)
    save_text_encoder(encoder, folder / "text_encoder", dtype=dtype)
    save_tokenizer(model.tokenizer, folder / "tokenizer")
    (folder / "scheduler").mkdir()
    write_json(scheduler_config_json(model.path, model.prediction), folder / "scheduler" / "scheduler_config.json")
    write_json(model_index(part, for_inpainting=parts.for_inpainting), folder / INDEX)
    (folder / NOTES).write_text(parts.notes, encoding="utf-8")


def check_target(folder: Path) -> None:
    """Raise ValueError if the folder exists and is no export: nothing else is ever replaced."""
    if folder.exists() and not (folder / INDEX).exists() and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not a model: give a new folder, or one that holds an older export")


def model_index(part: str, *, for_inpainting: bool = False) -> dict[str, Any]:
    """model_index.json: which of diffusers' pipelines opens the folder, and what each subfolder is."""
    common: dict[str, Any] = {
        "_diffusers_version": "0.30.0",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if part == "transformer":
        return {"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]} | common
    pipeline = "StableDiffusionInpaintPipeline" if for_inpainting else "StableDiffusionPipeline"
    nothing = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
    unet = {"unet": ["diffusers", "UNet2DConditionModel"], "requires_safety_checker": False}
    return {"_class_name": pipeline} | unet | common | nothing
