"""Read a model from a folder or a single file, optionally with another autoencoder, from a file of its own, and with
LoRAs; and what its small files say of it, before its weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.denoisers import UNetConfig
from ldm.diffusion import Prediction
from ldm.interop.compvis.names import vae_from_shapes, vae_names
from ldm.interop.compvis.reading import LEFT_OVER, attention_as_matrices, read_single_file, read_text_tower
from ldm.interop.diffusers_layout.denoiser import ALL_LAYOUTS, layout_of, read_denoiser_config
from ldm.interop.diffusers_layout.folder import (
    INDEX,
    SCHEDULER,
    TEXT_FOLDERS,
    open_text_parts,
    read_folder,
    read_sampling,
)
from ldm.interop.diffusers_layout.scheduler import read_scheduler
from ldm.interop.diffusers_layout.vae import load_vae, open_vae, with_new_names
from ldm.interop.embedding_files import EmbeddingSource, with_bundled, with_embeddings
from ldm.interop.given_parts import GivenParts
from ldm.interop.hub_cache import missing_model, repository_name
from ldm.interop.identify import FIRST_STAGE, is_vae, refuse_foreign, shapes_of, without_wrapping
from ldm.interop.lora import LayerChange, bundled_embeddings, merge_lora, open_lora, read_lora
from ldm.interop.network_files import RUN_MODEL, described_by, fill, model_folder
from ldm.interop.run_parts import RunDenoiser, model_without_export, run_towers, run_vae
from ldm.interop.trained_run import Report, TrainedWeights, exported_step, no_report, refuse_unfinished, trained_weights
from ldm.interop.weight_reader import open_weights
from ldm.model.components import ModelComponents, inpainting_channels
from ldm.model.conditioner import TextTower
from ldm.model.facts import ModelFacts
from vae.autoencoder import AutoencoderKL, AutoencoderKLConfig


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What a model is loaded with: see ldm.TextToImage.load."""

    vae: Path | None = None
    text: Path | None = None
    lora: Sequence[tuple[Path, float]] = ()
    ema: bool = True
    prediction: Prediction | None = None
    embeddings: Sequence[EmbeddingSource] = ()
    lora_folders: Sequence[Path] = ()  # of the LoRAs that prompts name


AS_IT_IS = LoadOptions()


def read_model(
    path: Path, options: LoadOptions = AS_IT_IS, *, dtype: torch.dtype, vae_dtype: torch.dtype | None = None
) -> ModelComponents:
    """Read a model in this precision, on the CPU. vae_dtype: the autoencoder's, if it is another.

    Of a run, the averaged weights of its newest valid checkpoint are read: see ldm.interop.trained_run.

    LoRAs are merged in float32 and the result is rounded once; this needs up to twice the memory.
    """
    folder, wanted = model_folder(path), dtype
    of_vae = vae_dtype or wanted
    dtype = torch.float32 if options.lora else wanted
    given, told = given_parts(options, dtype=dtype, vae_dtype=of_vae)
    if (trained := trained_weights(path)) is not None:
        parts = read_run(trained, dtype=dtype, vae_dtype=of_vae, prediction=options.prediction, given=given)
    elif folder.is_dir():
        parts = read_folder(folder, dtype=dtype, vae_dtype=of_vae, prediction=options.prediction, given=given)
        parts = with_exported_step(parts, folder)
    elif folder.exists():
        parts = read_single_file(
            path, dtype=dtype, vae_dtype=of_vae, ema=options.ema, prediction=options.prediction, given=given
        )
    else:
        raise FileNotFoundError(missing_model(path))
    for what, other in (("autoencoder", options.vae), ("text encoder", options.text)):
        of_run = f" ({told[what]})" if what in told else ""
        parts = parts if other is None else with_remark(parts, f"{what} of {other.name}{of_run}", place=other)
    if options.embeddings:
        conditioner = with_embeddings(parts.model.conditioner, options.embeddings)
        parts = replace(parts, model=replace(parts.model, conditioner=conditioner))
    for file, strength in options.lora:
        parts = add_lora(parts, file, strength)
        parts = with_remark(parts, f"LoRA {file.name} of strength {strength:g}")
    for network in (parts.denoiser, *parts.model.conditioner.encoders) if options.lora else ():
        network.to(wanted)
    return parts


def read_run(
    trained: TrainedWeights, *, dtype: torch.dtype, vae_dtype: torch.dtype, prediction: Prediction | None,
    given: GivenParts,
) -> ModelComponents:  # fmt: skip
    """Read the model of a run of ldm/train.py: its denoiser from the checkpoint, the frozen parts from the run's last
    export or, without one, from the folders that its configuration names."""
    if trained.kind != "denoiser":
        what, option = {"vae": ("an autoencoder", "--vae"), "clip": ("a text encoder", "--text")}.get(
            trained.kind, (trained.kind, "the option for it")
        )
        raise ValueError(
            f"{trained.run} is a training of {what}, not a text-to-image model: give it with {option}, beside a model"
        )
    denoiser, export = RunDenoiser(trained), trained.run / RUN_MODEL
    if (export / INDEX).exists():
        given = replace(given, denoiser=denoiser)
        parts = read_folder(export, dtype=dtype, vae_dtype=vae_dtype, prediction=prediction, given=given)
    else:
        named = trained.tree["model"]
        vae = given.vae(None) if given.vae else read_vae(Path(named["vae"]), dtype=vae_dtype, in_place_of=None)
        towers = given.towers or read_text(Path(named["text"]), dtype=dtype)
        parts = model_without_export(trained, vae, towers, dtype=dtype, prediction=prediction)
    return denoiser.described(parts)


def with_exported_step(parts: ModelComponents, folder: Path) -> ModelComponents:
    """Record which step an export in a run without valid checkpoints is of, if the run's metrics say so."""
    step = exported_step(folder.resolve().parent) if folder.name == RUN_MODEL else None
    if step is None:
        return parts
    assert parts.origin is not None
    return with_remark(replace(parts, origin=replace(parts.origin, step=step)), f"averaged weights of step {step}")


def given_parts(
    options: LoadOptions, *, dtype: torch.dtype, vae_dtype: torch.dtype
) -> tuple[GivenParts, dict[str, str]]:
    """Read the given text encoder; the autoencoder waits for the configuration of the model's own.

    Also returns what is reported of them, "autoencoder" and "text encoder", when they are read.
    """
    vae, text, told = options.vae, options.text, dict[str, str]()
    of_vae, of_text = (partial(told.__setitem__, what) for what in ("autoencoder", "text encoder"))
    given = GivenParts(
        vae=None if vae is None else lambda own: read_vae(vae, dtype=vae_dtype, in_place_of=own, report=of_vae),
        towers=None if text is None else read_text(text, dtype=dtype, report=of_text),
    )
    return given, told


def read_text(path: Path, *, dtype: torch.dtype, report: Report = no_report) -> tuple[TextTower, ...]:
    """Read a text encoder and its tokenizer: from a folder that holds text_encoder/ and tokenizer/, from text_encoder/
    itself, from a run of text/train.py, or from a file.

    report: gets the step of a run. Raises ValueError or FileNotFoundError for anything else.
    """
    trained = trained_weights(path)
    if trained is not None and trained.kind == "clip":
        report(trained.describe())
        return run_towers(trained, dtype=dtype)
    folder = model_folder(path)
    if folder.is_file():
        return (read_text_tower(folder, dtype=dtype),)
    if not folder.exists():
        raise FileNotFoundError(missing_model(path))
    encoder, tokenizer = TEXT_FOLDERS[0]
    if not (folder / encoder).is_dir() and folder.name == encoder and (folder.parent / tokenizer).is_dir():
        folder = folder.parent
    refuse_unfinished(path, folder / encoder)
    if not (folder / encoder).is_dir():
        raise ValueError(f"{path} has no {encoder}/: give a folder that holds {encoder}/ and {tokenizer}/, or a file")
    return tuple(text.read(dtype) for text in open_text_parts(folder))


def add_lora(parts: ModelComponents, path: Path, strength: float) -> ModelComponents:
    """Merge a file, or those of a LoRA's folder, into the weights, and add the embeddings that it brings.

    Raises ValueError, with no weight changed, if it is of another model.
    """
    lora, conditioner = lora_content(parts, path), parts.model.conditioner
    merge_lora(lora.changes, denoiser=parts.denoiser, text_encoder=conditioner.encoders[0], strength=strength)
    if lora.embeddings:
        conditioner = with_bundled(conditioner, lora.embeddings, path)
    return replace(parts, model=replace(parts.model, conditioner=conditioner))


class LoraContent(NamedTuple):
    """The changes that a LoRA makes to a model, and the tensors of embeddings that come with it, by name."""

    changes: list[LayerChange]
    embeddings: dict[str, dict[str, Tensor]]


def lora_content(parts: ModelComponents, path: Path) -> LoraContent:
    """Read a LoRA for a model. Raises ValueError if it is of another."""
    names = layout_of(parts.config).other_names(parts.denoiser, parts.config)
    encoder = parts.model.conditioner.encoders[0]
    found = LoraContent([], {})
    for weights in open_lora(path):
        found.changes.extend(read_lora(weights, denoiser=parts.denoiser, text_encoder=encoder, compvis_names=names))
        found.embeddings.update(bundled_embeddings(weights.tensors))
    return found


def with_remark(parts: ModelComponents, remark: str, *, place: Path | None = None) -> ModelComponents:
    """Note how the model was read; place: where a part of it came from, whose owners are to be named."""
    origin = parts.origin
    assert origin is not None
    places = (*origin.places, place) if place else origin.places
    return replace(parts, origin=replace(origin, remarks=(*origin.remarks, remark), places=places))


def model_name(path: Path) -> str:
    """Return the model's name for image metadata: the run, the folder, or the file without its suffix."""
    if path.is_file():
        return path.stem
    place = path.resolve()
    return repository_name(place) or (place.parent.name if place.name == RUN_MODEL else place.name)


def read_facts(path: Path) -> ModelFacts:
    """Read what the JSON files of a model's folder say of it; a single file says nothing before it is loaded.

    A file that is not there leaves its facts unknown: its absence is reported by whoever loads the model. Raises
    ValueError, naming the file, for one that is damaged or of another kind of model.
    """
    folder = model_folder(path)
    facts: dict[str, Any] = {"name": model_name(path)}
    networks = [file for layout in ALL_LAYOUTS if (file := folder / layout.folder / "config.json").exists()]
    scheduler = read_scheduler(file) if (file := folder / SCHEDULER).exists() else None
    if scheduler is not None:
        facts["path"] = scheduler[0]
    if len(networks) != 1:
        return ModelFacts(**facts)
    config, around = read_denoiser_config(networks[0])
    if scheduler is not None:
        unet, inpainting = isinstance(config, UNetConfig), around.concat_channels > 0
        facts["scheduler"] = read_sampling(folder, *scheduler, unet=unet, inpainting=inpainting).stock
    facts["learned_variance"] = around.learned_variance
    if (folder / "vae" / "config.json").exists():
        vae = open_vae(folder / "vae")
        facts["native_size"] = around.sample_size * vae.config.factor
        facts["factor"] = vae.config.factor * config.stride
        facts["for_inpainting"] = around.concat_channels == inpainting_channels(vae)
    return ModelFacts(**facts)


def read_vae(
    path: Path, *, dtype: torch.dtype, in_place_of: AutoencoderKLConfig | None, report: Report = no_report
) -> AutoencoderKL:
    """Read an autoencoder from a folder that holds its config.json, or a vae/ with one; from a run of vae/train.py; or
    from a file, which may be that of a complete model.

    A file does not state the shift and scale of its latents: those of the model's own are used, or Stable Diffusion's
    if it has none. report: gets the step of a run. Raises ValueError or FileNotFoundError for anything else, and for
    latents of another shape than the model's.
    """
    trained = trained_weights(path)
    if trained is not None and trained.kind == "vae":
        report(trained.describe())
        vae = run_vae(trained, dtype=dtype)
    elif path.is_dir():
        folder = path if (path / "config.json").exists() else model_folder(path) / "vae"
        refuse_unfinished(path, folder)
        vae = load_vae(folder, dtype=dtype)
    else:
        vae = _read_vae_file(path, dtype=dtype, in_place_of=in_place_of or AutoencoderKLConfig())
    if in_place_of is None:
        return vae
    ours, theirs = in_place_of, vae.config
    if (ours.latent_channels, ours.factor) != (theirs.latent_channels, theirs.factor):
        raise ValueError(
            f"{path} makes latents of {theirs.latent_channels} channels at 1/{theirs.factor} of the image's side, "
            f"expected {ours.latent_channels} at 1/{ours.factor}, as the model's own does: give one that fits the model"
        )
    return vae


def _read_vae_file(path: Path, *, dtype: torch.dtype, in_place_of: AutoencoderKLConfig) -> AutoencoderKL:
    weights = open_weights(path).changed(without_wrapping).changed(_below_first_stage)
    shapes = shapes_of(weights.tensors)
    refuse_foreign(shapes, source=path)
    if not is_vae(shapes):
        raise ValueError(
            f"{path} is not an autoencoder ({', '.join(sorted(shapes)[:3])}): give one of Stable Diffusion's"
        )
    with described_by(path), torch.device("meta"):
        config = replace(vae_from_shapes(shapes), norm_num_groups=in_place_of.norm_num_groups)
        if config.latent_channels == in_place_of.latent_channels:
            config = replace(config, latent_mean=in_place_of.latent_mean, latent_std=in_place_of.latent_std)
        vae = AutoencoderKL(config)
    if any(".down_blocks." in name for name in shapes):
        fill(vae, weights.changed(with_new_names), dtype=dtype)
        return vae
    names = {theirs: ours for ours, theirs in vae_names(vae.state_dict(), config).items()}
    fill(vae, weights.changed(lambda found: {names.get(name, name): t for name, t in found.items()}), dtype=dtype)
    return vae


def _below_first_stage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefix, the networks of the training loss, and the other parts of a complete model."""
    inside = any(name.startswith(FIRST_STAGE) for name in tensors)
    return {
        name.removeprefix(FIRST_STAGE): tensor
        for name, tensor in attention_as_matrices(tensors).items()
        if (name.startswith(FIRST_STAGE) or not inside)
        and not name.startswith("loss.")
        and not LEFT_OVER.fullmatch(name)
    }
