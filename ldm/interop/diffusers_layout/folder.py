"""Read and write a model as a folder in diffusers' layout. Reading never executes code from the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.diffusion import Prediction
from ldm.files.atomic import atomic_folder
from ldm.files.strict_json import write_json
from ldm.interop.diffusers_layout.denoiser import ALL_LAYOUTS, OWN, layout_of, open_denoiser, save_denoiser
from ldm.interop.diffusers_layout.layout import VERSION, DenoiserLayout
from ldm.interop.diffusers_layout.scheduler import read_scheduler, scheduler_config_json
from ldm.interop.diffusers_layout.vae import folded, open_vae, save_vae, vae_weights
from ldm.interop.network_files import TEXT_STEM, WEIGHTS_STEM, described_by, fill, find_weights, read_config
from ldm.interop.weight_reader import Weights, describe
from ldm.model.components import ModelComponents, Origin, check_components_fit
from ldm.model.conditioner import Conditioner, TextTower
from ldm.model.latent_diffusion import LatentDiffusion
from text.conversion import flattened, read_text_encoder_config, save_text_encoder, text_encoder_from_weights
from text.encoder import OpenClipTextEncoder, TextEncoderConfig, TransformersTextEncoder
from text.tokenizer import load_tokenizer, save_tokenizer

NOTES = "foundry.yaml"
INDEX = "model_index.json"
MAX_NOTES_BYTES = 2**20
# Allowed in a model_index.json: diffusers' own pipelines, and known classes for the parts that are read.
PIPELINES = {
    "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
    "PixArtAlphaPipeline", "PixArtSigmaPipeline", OWN.pipeline(for_inpainting=False),
}  # fmt: skip
KNOWN_CLASSES = {
    **{layout.folder: [[layout.library, name] for name in layout.classes] for layout in ALL_LAYOUTS},
    "vae": [["diffusers", "AutoencoderKL"]],
    **{part: [["transformers", "CLIPTextModel"]] for part in ("text_encoder", "text_encoder_2")},
    **{
        part: [["transformers", "CLIPTokenizer"], ["transformers", "CLIPTokenizerFast"]]
        for part in ("tokenizer", "tokenizer_2")
    },
}
PARTS_READ = KNOWN_CLASSES.keys()
SUFFIXES = ("", "_2")  # of the folders of text encoders and their tokenizers


def read_folder(folder: Path, *, dtype: torch.dtype, prediction: Prediction | None = None) -> ModelComponents:
    """Read a model in this precision, on the CPU. prediction: overrides the one in the scheduler's config.

    Raises ValueError or FileNotFoundError, naming the file, if a file is missing, truncated or of another kind.
    """
    check_index(folder)
    # Read all configs before any weights, so that an unsuitable folder fails at once and not after a minute.
    part = folder / _denoiser_part(folder)
    path, stated = read_scheduler(folder / "scheduler" / "scheduler_config.json")
    scheduler_config_json(path, prediction or stated)  # raises for a prediction that this path does not have
    tokenizers = [load_tokenizer(folder / f"tokenizer{suffix}") for suffix in _text_suffixes(folder)]
    loaded, vae = open_denoiser(part), open_vae(folder / "vae")
    text_folders = [folder / f"text_encoder{suffix}" for suffix in _text_suffixes(folder)]
    text_configs = [_text_config(place / "config.json") for place in text_folders]
    check_components_fit(loaded, vae, list(zip(text_configs, tokenizers, strict=True)), source=folder)
    text_weights = [_text_weights(place) for place in text_folders]
    weights, of_vae = find_weights(part, WEIGHTS_STEM), vae_weights(folder / "vae")
    # The text encoders first, so that their mapped pages are released before the larger parts are read.
    towers = [
        TextTower(_text_encoder(place, config, found, dtype=dtype), tokenizer)
        for place, config, found, tokenizer in zip(text_folders, text_configs, text_weights, tokenizers, strict=True)
    ]
    fill(vae, of_vae, dtype=dtype)
    fill(loaded.network, weights, dtype=dtype)
    model = LatentDiffusion(vae=vae, conditioner=Conditioner(*towers), path=path, prediction=prediction or stated)
    notes = own_file(folder, folder / NOTES, most=MAX_NOTES_BYTES)
    return ModelComponents(
        model=model,
        denoiser=loaded.network,
        config=loaded.config,
        sample_size=loaded.sample_size,
        notes=notes.decode(errors="replace"),
        origin=Origin(files=weights.files, precision=_precision([weights, *text_weights, of_vae])),
    )


def _text_suffixes(folder: Path) -> Sequence[str]:
    return SUFFIXES if (folder / f"text_encoder{SUFFIXES[1]}").is_dir() else SUFFIXES[:1]


def _text_encoder(
    folder: Path, config: TextEncoderConfig, weights: Weights, *, dtype: torch.dtype
) -> TransformersTextEncoder:
    with described_by(folder):
        return text_encoder_from_weights(config, weights.read(dtype), dtype=dtype)


def _text_config(source: Path) -> TextEncoderConfig:
    content = read_config(source)
    with described_by(source):
        return read_text_encoder_config(content)


def _text_weights(folder: Path) -> Weights:
    found = find_weights(folder, TEXT_STEM)
    with described_by(found.source):
        return found.changed(flattened)


def own_file(folder: Path, file: Path, *, most: int) -> bytes:
    """Read a file next to the weights, to be copied into the export; b"" if it does not exist.

    Raises ValueError for a link that leads out of the folder, whose target would be published with the export, for
    anything but a plain file, and for more than `most` bytes.
    """
    if not file.exists():
        return b""
    if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()) or file.stat().st_size > most:
        raise ValueError(
            f"{file} is not a plain file of at most {most} bytes in its folder: remove it, or copy it there"
        )
    return file.read_bytes()


def check_index(folder: Path) -> None:
    """Raise ValueError if model_index.json, if it exists, names classes that are not diffusers' own."""
    index = folder / INDEX
    if not index.exists():
        return
    content = read_config(index)
    pipeline = str(content.get("_class_name", "StableDiffusionPipeline"))
    if pipeline not in PIPELINES:
        raise ValueError(f"{index} names a {pipeline[:60]!r}, expected one of {', '.join(sorted(PIPELINES))}")
    for name in PARTS_READ & content.keys():
        if content[name] not in KNOWN_CLASSES[name]:
            raise ValueError(
                f"{index} names the class {str(content[name])[:60]} for {name}: refused; only "
                f"{' or '.join('.'.join(pair) for pair in KNOWN_CLASSES[name])} is read"
            )


def _denoiser_part(folder: Path) -> str:
    parts = [layout.folder for layout in ALL_LAYOUTS if (folder / layout.folder).is_dir()]
    if len(parts) != 1:
        found = sorted(entry.name for entry in folder.iterdir())[:8]
        raise ValueError(f"{folder} holds {found}, expected unet/ or transformer/: this is not a text-to-image model")
    return parts[0]


def _precision(parts: Sequence[Weights]) -> str:
    return describe({f"{part}.{name}": t for part, found in enumerate(parts) for name, t in found.tensors.items()})


def write_folder(
    parts: ModelComponents, folder: Path, *, dtype: torch.dtype, beside: Mapping[str, bytes] | None = None
) -> None:
    """Write a model to a folder. It replaces an older export there once it is complete.

    beside: additional files, such as a model card, by their path in the folder. Raises ValueError if the folder exists
    and is not an export: nothing else is ever deleted.
    """
    check_target(folder)
    with atomic_folder(folder) as partial:
        write_parts(parts, partial, dtype=dtype)
        for name, content in (beside or {}).items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)


def write_parts(parts: ModelComponents, folder: Path, *, dtype: torch.dtype) -> None:
    """Write a model's parts into an existing, empty folder."""
    model, towers = parts.model, parts.model.conditioner.towers
    layout = layout_of(parts.config)
    save_denoiser(
        parts.denoiser,
        parts.config,
        folder / layout.folder,
        sample_size=parts.sample_size,
        context_width=model.conditioner.width,
        dtype=dtype,
    )
    save_vae(folded(model.vae), folder / "vae", dtype=dtype)
    for suffix, (encoder, tokenizer) in zip(SUFFIXES[: len(towers)], towers, strict=True):
        assert isinstance(encoder, OpenClipTextEncoder | TransformersTextEncoder)
        save_text_encoder(encoder, folder / f"text_encoder{suffix}", dtype=dtype)
        save_tokenizer(tokenizer, folder / f"tokenizer{suffix}")
    (folder / "scheduler").mkdir()
    write_json(scheduler_config_json(model.path, model.prediction), folder / "scheduler" / "scheduler_config.json")
    write_json(model_index(layout, text_encoders=len(towers), for_inpainting=parts.for_inpainting), folder / INDEX)
    (folder / NOTES).write_text(parts.notes, encoding="utf-8")


def check_target(folder: Path) -> None:
    """Raise ValueError if the folder exists and is not an export of ours: nothing else is ever replaced."""
    exported = (folder / INDEX).exists() and (folder / NOTES).exists()
    if folder.exists() and not exported and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an export of this program: give a new folder, or an older export")


def model_index(layout: DenoiserLayout[Any], *, text_encoders: int = 1, for_inpainting: bool = False) -> dict[str, Any]:
    """Build model_index.json: the pipeline that opens the folder, and the class of each subfolder."""
    texts: dict[str, Any] = {}
    for suffix in SUFFIXES[:text_encoders]:
        texts[f"text_encoder{suffix}"] = ["transformers", "CLIPTextModel"]
        texts[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    return {
        "_class_name": layout.pipeline(for_inpainting=for_inpainting),
        layout.folder: [layout.library, layout.classes[0]],
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        **texts,
        "vae": ["diffusers", "AutoencoderKL"],
        **layout.further_parts,
    }
