"""Build what a run trains from its checkpoint: an autoencoder, a text encoder, a denoiser and the model around it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch

from ldm.denoisers import DenoiserConfig
from ldm.diffusion import PathConfig, Prediction
from ldm.interop.diffusers_layout.vae import folded, load_vae, vae_weights
from ldm.interop.network_files import fill, find_weights
from ldm.interop.trained_run import TrainedWeights, same_weights
from ldm.interop.weight_reader import Weights, describe
from ldm.model.components import LoadedDenoiser, ModelComponents, Origin
from ldm.model.conditioner import Conditioner, TextTower
from ldm.model.latent_diffusion import LatentDiffusion
from text.conversion import flattened, open_clip_to_transformers, saved_config, text_encoder_from_weights
from text.encoder import TextEncoderConfig, TransformersTextEncoder
from text.tokenizer import Tokenizer
from vae.autoencoder import AutoencoderKL, AutoencoderKLConfig


def run_vae(trained: TrainedWeights, *, dtype: torch.dtype) -> AutoencoderKL:
    """Build the autoencoder of a run of vae/train.py.

    The statistics of its latents are those of RUN/vae if that has the same weights, as at the end of a training;
    otherwise those measured with the checkpoint. Raises ValueError if there are none.
    """
    config = _parsed(AutoencoderKLConfig, trained, "vae")
    with torch.device("meta"):
        weights = trained.weights_of(AutoencoderKL(config))
    with suppress(ValueError, OSError):  # no export, or a damaged one
        if same_weights(weights.tensors, vae_weights(trained.run / "vae").tensors):
            return load_vae(trained.run / "vae", dtype=dtype)
    measured = trained.measured.get("latents")
    if measured is None:
        raise ValueError(
            f"{trained.checkpoint} does not record the statistics of the latents, as version 0.2 did not before the "
            f"end of a training: start the training again with run.steps={trained.step}, which measures them"
        )
    mean, std = (tuple(map(float, measured[name])) for name in ("mean", "std"))
    with torch.device("meta"):
        vae = AutoencoderKL(replace(config, latent_mean=mean, latent_std=std))
    fill(vae, weights, dtype=dtype)
    return vae


def run_towers(trained: TrainedWeights, *, dtype: torch.dtype) -> tuple[TextTower, ...]:
    """Build the text encoder of a run of text/train.py, as its export would be read, and its tokenizer."""
    config = saved_config(_parsed(TextEncoderConfig, trained, "text"))
    tokens = Tokenizer(config.tokenizer)
    config = replace(config, pad_id=tokens.config.pad_id, bos_id=tokens.bos_id, eos_id=tokens.eos_id)
    with torch.device("meta"):
        network = TransformersTextEncoder(config).model
    weights = trained.weights_of(network, rename=lambda found: flattened(open_clip_to_transformers(found)))
    return (TextTower(text_encoder_from_weights(config, weights.read(dtype), dtype=dtype), tokens),)


class RunDenoiser:
    """The weights of a run's denoiser, for its network: see GivenParts.denoiser."""

    def __init__(self, trained: TrainedWeights) -> None:
        self.trained = trained

    def __call__(self, loaded: LoadedDenoiser, export: Path) -> Weights:
        """Return the checkpoint's weights; the files of the run's last export if they hold the same."""
        weights = self.trained.weights_of(loaded.network)
        with suppress(ValueError, OSError):  # a damaged export, or one that training replaces just now
            if same_weights(weights.tensors, (exported := find_weights(export)).tensors):
                return exported
        return weights

    def described(self, parts: ModelComponents) -> ModelComponents:
        """Record in a model that was read with these weights which step they are of."""
        trained, origin = self.trained, parts.origin
        assert origin is not None
        from_checkpoint = origin.files[0].parent == trained.checkpoint
        origin = replace(
            origin,
            remarks=(*origin.remarks, trained.describe()),
            digest=trained.digest if from_checkpoint else None,
            step=trained.step,
            samples_seen=trained.samples_seen,
        )
        return replace(parts, notes=trained.config, origin=origin)


def model_without_export(
    trained: TrainedWeights, vae: AutoencoderKL, towers: Sequence[TextTower], *, dtype: torch.dtype,
    prediction: Prediction | None = None,
) -> ModelComponents:  # fmt: skip
    """Build the model of a run that was stopped before its first export, by its configuration.

    prediction: overrides the configuration's.
    """
    config: Any = _parsed(Annotated[DenoiserConfig, _by_kind()], trained, "model", "denoiser")
    objective = trained.tree["model"]["objective"]
    side, conditioner = trained.tree["data"]["image_size"] // vae.config.factor, Conditioner(*towers)
    with torch.device("meta"):
        network = config.build(
            latent_channels=vae.config.latent_channels,
            context_width=conditioner.width,
            learned_variance=bool(objective.get("learned_variance")),
        )
    weights = trained.weights_of(network)
    fill(network, weights, dtype=dtype)
    path: Any = _parsed(Annotated[PathConfig, _by_kind()], trained, "model", "path")
    return ModelComponents(
        model=LatentDiffusion(
            vae=folded(vae), conditioner=conditioner, path=path, prediction=prediction or objective["prediction"]
        ),
        denoiser=network,
        config=config,
        sample_size=side,
        origin=Origin(files=weights.files, precision=describe(weights.tensors)),
    )


def _by_kind() -> Any:
    from ldm.config import BY_KIND

    return BY_KIND


def _parsed(kind: Any, trained: TrainedWeights, *keys: str) -> Any:
    """Parse a section of the run's configuration. Raises ValueError if it does not have it."""
    from ldm.config import parse

    tree: Any = trained.tree
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return parse(kind, tree, source=f"{trained.checkpoint}, {'.'.join(keys)}")
