"""What the training of a denoiser starts from: the weights of another model, which was trained in the same latents,
with the same text encoder, to predict the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ldm.denoisers import Denoiser
from ldm.files.paths import user_path
from ldm.interop.diffusers_layout.denoiser import layout_of, load_denoiser
from ldm.interop.diffusers_layout.folder import SCHEDULER, TEXT_FOLDERS
from ldm.interop.diffusers_layout.scheduler import read_scheduler
from ldm.interop.diffusers_layout.vae import folded, scale_of
from ldm.interop.network_files import RUN_MODEL, load_strictly, model_folder
from ldm.interop.read_model import read_text, read_vae
from ldm.interop.trained_run import TrainedWeights, trained_weights
from ldm.model.latent_diffusion import LatentDiffusion
from ldm.training.denoiser_config import TrainConfig
from vae.autoencoder import AutoencoderKL

ROUNDING = 0.01  # relative distance of a tensor from itself after rounding to bf16 (0.002), with a margin
ENCODER = ("encoder.", "quant_conv.")  # the part of an autoencoder that makes the latents
WORDS = {"vae": "autoencoder", "text": "text encoder", "objective.prediction": "prediction"}  # below `model`


def start_from(
    denoiser: Denoiser, config: TrainConfig, model: LatentDiffusion, folder: str, log: Callable[[str], object]
) -> None:
    """Load the weights of a model or run into a fresh denoiser.

    model: what it is trained for. log: gets the step of a run. Raises ValueError if the weights are of another network,
    or were trained with another autoencoder, text encoder or prediction, unless run.allow names that.
    """
    path = user_path(folder)
    trained = trained_weights(path)
    if trained is not None and trained.kind != "denoiser":
        raise ValueError(f"model.start is {folder}, a training of kind {trained.kind}: give a run of ldm/train.py")
    for key in others(model, path, trained):
        if f"model.{key}" not in config.run.allow:
            same = f"set model.{key}={folder}" if key in ("vae", "text") else f"set model.{key} to that"
            raise ValueError(
                f"model.start is {folder}, which was trained with another {WORDS[key]} than that of model.{key}: "
                f"{same}, or allow it with run.allow=[model.{key}]"
            )
    if trained is not None:
        remedy = f"set model.denoiser as in {trained.run / 'config.yaml'}, or leave model.start out"
        weights = trained.weights_of(denoiser, remedy=remedy).tensors
        load_strictly(denoiser, {name: tensor.clone() for name, tensor in weights.items()}, source=trained.checkpoint)
        log(f"model.start: {trained.describe()} of {folder}")
        return
    source = model_folder(path) / layout_of(config.model.denoiser).folder
    load_strictly(denoiser, load_denoiser(source).network.state_dict(), source=source)


def check_same_half(config: TrainConfig, model: LatentDiffusion, log: Callable[[str], object]) -> None:
    """Raise ValueError if the run of this configuration began with another autoencoder or text encoder than `model`
    has: the folder that is named may hold a training that went on, or another by now."""
    export = config.run.path / RUN_MODEL
    if not export.is_dir():
        return
    try:
        changed = list(others(model, export, None))
    except (OSError, ValueError):
        log(f"{export} is damaged, so model.vae and model.text are not compared with it; the next sample replaces it")
        return
    for key in changed:
        if key in ("vae", "text") and f"model.{key}" not in config.run.allow:
            raise ValueError(
                f"model.{key} ({getattr(config.model, key)}) is no longer the {WORDS[key]} that this run began with: "
                f"restore it, or go on with the run's own by model.{key}={export} run.allow=[model.{key}]"
            )


def others(model: LatentDiffusion, path: Path, trained: TrainedWeights | None) -> Iterator[str]:
    """Yield "vae", "text", "objective.prediction" for each that another model was trained with otherwise.

    path: of the model's folder, or run, of which `trained` was read. What is not known of it is not compared.
    """
    folder = model_folder(path)
    named = trained.tree["model"] if trained is not None and folder == path else None
    vae = user_path(named["vae"]) if named else folder / "vae"
    text = user_path(named["text"]) if named else folder / TEXT_FOLDERS[0][0]
    if vae.exists() and not same_latents(model.vae, read_vae(vae, dtype=torch.float32, in_place_of=None)):
        yield "vae"
    if text.exists():
        towers = zip(model.conditioner.towers, theirs := read_text(text, dtype=torch.float32), strict=False)
        pairs = [(our.encoder.state_dict(), their.encoder.state_dict()) for our, their in towers]
        if len(theirs) != len(model.conditioner.towers) or not all(alike(*pair) for pair in pairs):
            yield "text"
    if named or (folder / SCHEDULER).exists():
        prediction = named["objective"]["prediction"] if named else read_scheduler(folder / SCHEDULER)[1]
        if prediction != model.prediction:
            yield "objective.prediction"


def same_latents(ours: AutoencoderKL, theirs: AutoencoderKL) -> bool:
    """Return whether two autoencoders make the same latents, up to the rounding of an export."""
    first, second = (folded(vae) for vae in (ours, theirs))
    scales = [scale_of(vae.config) or 0.0 for vae in (first, second)]
    encoders = [
        {name: tensor for name, tensor in vae.state_dict().items() if name.startswith(ENCODER)}
        for vae in (first, second)
    ]
    return abs(scales[0] - scales[1]) <= ROUNDING * scales[0] and alike(*encoders)


def alike(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Return whether both are the same tensors, up to rounding."""
    if {name: t.shape for name, t in ours.items()} != {name: t.shape for name, t in theirs.items()}:
        return False
    distances = ((tensor.cpu() - theirs[name].cpu()).norm() for name, tensor in ours.items())
    return all(d <= ROUNDING * ours[name].norm().cpu() for name, d in zip(ours, distances, strict=True))
