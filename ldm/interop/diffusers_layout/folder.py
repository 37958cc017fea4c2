"""A model as a folder in diffusers' layout: read as data, with nothing in it executed; written for everybody."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ldm.diffusion import Prediction
from ldm.files.atomic import atomic_folder
from ldm.files.strict_json import read_json, write_json
from ldm.interop.diffusers_layout.denoiser import denoiser_folder, open_denoiser, save_denoiser
from ldm.interop.diffusers_layout.scheduler import read_scheduler, scheduler_config_json
from ldm.interop.diffusers_layout.vae import folded, open_vae, save_vae, vae_weights
from ldm.interop.network_files import check_no_code, described_by, fill
from ldm.interop.weight_files import TEXT_STEM, WEIGHTS_STEM, find_weights
from ldm.interop.weight_reader import Weights, describe
from ldm.model.components import Origin, Parts, check_parts_fit, denoiser_channels
from ldm.model.latent_diffusion import LatentDiffusion
from text import (
    OpenClipTextEncoder,
    TextEncoderConfig,
    TransformersTextEncoder,
    flattened,
    load_tokenizer,
    read_text_encoder_config,
    save_text_encoder,
    save_tokenizer,
    text_encoder_from_weights,
)

NOTES = "foundry.yaml"
INDEX = "model_index.json"
MAX_NOTES_BYTES = 2**20
# What a model_index.json may name: diffusers' own pipelines, and of the parts that are read the classes that are known.
PIPELINES = {
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
    "PixArtAlphaPipeline", "PixArtSigmaPipeline",
}  # fmt: skip
KNOWN_CLASSES = {
    "unet": [["diffusers", "UNet2DConditionModel"]],
    "transformer": [["diffusers", "PixArtTransformer2DModel"], ["diffusers", "Transformer2DModel"]],
    "vae": [["diffusers", "AutoencoderKL"]],
    "text_encoder": [["transformers", "CLIPTextModel"]],
    "tokenizer": [["transformers", "CLIPTokenizer"], ["transformers", "CLIPTokenizerFast"]],
}
PARTS_READ = KNOWN_CLASSES.keys()


def read_folder(folder: Path, *, dtype: torch.dtype, prediction: Prediction | None = None) -> Parts:
    """A model in this precision, on the CPU. prediction: in place of what the scheduler's config says.

    Raises ValueError or FileNotFoundError, naming the file, for anything missing, cut short or something else.
    """
    check_index(folder)
    # All configs before any weights: a folder of something else should not first be read for a minute.
    part = folder / _denoiser_part(folder)
    path, told = read_scheduler(folder / "scheduler" / "scheduler_config.json")
    scheduler_config_json(path, prediction or told)  # raises for a prediction that this path does not have
    tokenizer = load_tokenizer(folder / "tokenizer")
    loaded, vae = open_denoiser(part), open_vae(folder / "vae")
    text_folder = folder / "text_encoder"
    text_config = _text_config(text_folder / "config.json")
    check_parts_fit(loaded, vae, text_config, tokenizer, source=folder)
    text_weights = _text_weights(text_folder)
    weights, of_vae = find_weights(part, WEIGHTS_STEM), vae_weights(folder / "vae")
    # The text encoder first: what is mapped of its files is let go before the larger parts come.
    with described_by(text_folder):
        text_encoder = text_encoder_from_weights(text_config, text_weights.read(dtype), dtype=dtype)
    fill(vae, of_vae, dtype=dtype)
    fill(loaded.network, weights, dtype=dtype)
    model = LatentDiffusion(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        path=path,
        prediction=prediction or told,
        learned_variance=loaded.learned_variance,
    )
    notes = own_file(folder, folder / NOTES, most=MAX_NOTES_BYTES)
    return Parts(
        model=model,
        denoiser=loaded.network,
        config=loaded.config,
        sample_size=loaded.sample_size,
        notes=notes.decode(errors="replace"),
        origin=Origin(files=weights.files, precision=_precision(weights, text_weights, of_vae)),
    )


def _text_config(source: Path) -> TextEncoderConfig:
    content = read_json(source)
    check_no_code(content, source=source)
    with described_by(source):
        return read_text_encoder_config(content)


def _text_weights(folder: Path) -> Weights:
    found = find_weights(folder, TEXT_STEM)
    with described_by(found.source):
        return found.changed(flattened)


def own_file(folder: Path, file: Path, *, most: int) -> bytes:
    """What stands beside the weights, to be carried along: b"" if it is not there.

    Raises ValueError for a link that leads out of the folder, whose aim would be published with the export, for what is
    no plain file, and for one of more bytes than that.
    """
    if not file.exists():
        return b""
    if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()) or file.stat().st_size > most:
        raise ValueError(f"{file} is no plain file in its folder of at most {most} bytes: remove it, or copy it there")
    return file.read_bytes()


def check_index(folder: Path) -> None:
    """Raise ValueError if model_index.json, where there is one, asks for classes that are not diffusers' own."""
    index = folder / INDEX
    if not index.exists():
        return
    content = read_json(index)
    check_no_code(content, source=index)
    pipeline = str(content.get("_class_name", "StableDiffusionPipeline"))
    if pipeline not in PIPELINES:
        raise ValueError(f"{index} asks for a {pipeline[:60]!r}, expected one of {', '.join(sorted(PIPELINES))}")
    for name in PARTS_READ & content.keys():
        if content[name] not in KNOWN_CLASSES[name]:
            raise ValueError(
                f"{index} asks for {name} of {str(content[name])[:60]}: refused; only "
                f"{' or '.join('.'.join(pair) for pair in KNOWN_CLASSES[name])} is read"
            )


def _denoiser_part(folder: Path) -> str:
    parts = [name for name in ("transformer", "unet") if (folder / name).is_dir()]
    if len(parts) != 1:
        found = sorted(entry.name for entry in folder.iterdir())[:8]
        raise ValueError(f"{folder} holds {found}, expected unet/ or transformer/: this is not a text-to-image model")
    return parts[0]


def _precision(denoiser: Weights, text: Weights, vae: Weights) -> str:
    parts = {"denoiser": denoiser, "text": text, "vae": vae}
    return describe({f"{part}.{name}": t for part, found in parts.items() for name, t in found.tensors.items()})


def write_folder(parts: Parts, folder: Path, *, dtype: torch.dtype, beside: Mapping[str, bytes] | None = None) -> None:
    """Write the whole folder; an older export there is replaced when the new one is whole.

    beside: further files, by their path in the folder, as a model card. Raises ValueError if the folder exists and is
    no export: nothing else is ever deleted.
    """
    check_target(folder)
    with atomic_folder(folder) as whole:
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
    """Raise ValueError if the folder exists and is no export of ours: nothing else is ever replaced."""
    exported = (folder / INDEX).exists() and (folder / NOTES).exists()
    if folder.exists() and not exported and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is no export of this program: give a new folder, or an older export")


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
