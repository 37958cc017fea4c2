"""The components of a complete text-to-image model, as read from or written to any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ldm.denoisers import Denoiser, DenoiserConfig
from ldm.files.digest import short_hash
from ldm.model.latent_diffusion import LatentDiffusion
from ldm.samplers.stock.scheduler import StockScheduler
from text.encoder import TextEncoderConfig
from text.tokenizer import Tokenizer
from vae.autoencoder import AutoencoderKL


class LoadedDenoiser(NamedTuple):
    network: Denoiser
    config: DenoiserConfig
    sample_size: int  # side of its native latents
    context_width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The files that a model was read from, and remarks on how."""

    files: tuple[Path, ...]  # of the denoiser
    precision: str  # of all weights, and their number: "fp16, 1131 tensors"
    remarks: tuple[str, ...] = ()  # "averaged weights (EMA)"
    digest: str | None = None  # of files that a training may remove
    step: int | None = None  # of a run's training, if known
    samples_seen: int | None = None  # up to then
    places: tuple[Path, ...] = ()  # the model's folder or file, and those of parts that were given in place of its own

    def hash(self) -> str:
        """Return the first 10 hex digits of the SHA-256 of the denoiser's files. Reads all of them: 4 GB take 3 s."""
        return short_hash(self.files) if self.digest is None else self.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelComponents:
    """The content of a model's folder or single file."""

    model: LatentDiffusion
    denoiser: Denoiser
    config: DenoiserConfig
    sample_size: int  # side of the native latents
    notes: str = ""  # foundry.yaml: the resolved configuration of the run
    origin: Origin | None = field(default=None, compare=False)
    scheduler: StockScheduler | None = None  # what its folder says about sampling; None: our own default
    unfollowed: str = ""  # what of that is not followed, so that our default is used

    @property
    def as_loaded(self) -> LoadedDenoiser:
        return LoadedDenoiser(self.denoiser, self.config, self.sample_size, self.model.conditioner.width)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The denoiser, the autoencoder and the text encoders."""
        return self.denoiser, self.model.vae, *self.model.conditioner.encoders

    @property
    def for_inpainting(self) -> bool:
        """Whether the denoiser also takes a mask and the masked image."""
        return self.denoiser.concat_channels == inpainting_channels(self.model.vae)

    def describe(self) -> str:
        """Describe in one line the kind of model, its prediction, and how it was read."""
        kind = f"{self.config.describe(self.model.conditioner.width)}{' for inpainting' * self.for_inpainting}"
        origin = (self.origin.precision, *self.origin.remarks) if self.origin else ()
        return ", ".join([kind, f"predicts {self.model.prediction} on path {self.model.path.kind}", *origin])


def inpainting_channels(vae: AutoencoderKL) -> int:
    """Return the channels of an inpainting network in addition to x_t: a mask, and the latents of the masked image."""
    return 1 + vae.config.latent_channels


def check_components_fit(
    denoiser: LoadedDenoiser, vae: AutoencoderKL, towers: Sequence[tuple[TextEncoderConfig, Tokenizer]], *, source: Path
) -> None:
    """Raise ValueError, naming both, if two components were not made for each other."""
    network, channels = denoiser.network, vae.config.latent_channels
    further = f" and {network.concat_channels} more" * (network.concat_channels not in (0, inpainting_channels(vae)))
    width = sum(config.width for config, _ in towers)
    pairs = [
        ("latent channels", f"{network.latent_channels}{further}", "the denoiser", str(channels), "the autoencoder"),
        ("wide a context", str(denoiser.context_width), "the denoiser", str(width), "the text encoder"),
    ]
    for config, tokenizer in towers:
        tokens = str(tokenizer.vocab_size), "the tokenizer", str(config.vocab_size), "the text encoder"
        pairs.append(("tokens", *tokens))
    for what, of_one, one, of_other, other in pairs:
        if of_one != of_other:
            raise ValueError(
                f"{source}: {one} is made for {of_one} {what}, {other} for {of_other}: give a model whose parts "
                "belong together"
            )
