"""A whole text-to-image model as it lies on disk, whatever the layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ldm.denoisers import DenoiserConfig, UNet, UNetConfig
from ldm.files.digest import short_hash
from ldm.model.latent_diffusion import LatentDiffusion
from text import TextEncoderConfig, Tokenizer
from vae import AutoencoderKL


class LoadedDenoiser(NamedTuple):
    network: nn.Module
    config: DenoiserConfig
    sample_size: int  # side of its native latents
    in_channels: int
    context_width: int
    learned_variance: bool  # whether it has a second half of output channels


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a model was read from, and how."""

    files: tuple[Path, ...]  # of the denoiser
    precision: str  # of all weights, and their number: "fp16, 1131 tensors"
    remarks: tuple[str, ...] = ()  # "averaged weights (EMA)"

    def hash(self) -> str:
        """First 10 hex digits of the denoiser's files' SHA-256. Reads all of them: 4 GB take 3 seconds."""
        return short_hash(self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What folders and single files hold."""

    model: LatentDiffusion
    denoiser: nn.Module
    config: DenoiserConfig
    sample_size: int  # side of the native latents
    notes: str = ""  # foundry.yaml: the resolved configuration of the run
    origin: Origin | None = field(default=None, compare=False)

    @property
    def networks(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The denoiser, the autoencoder and the text encoder."""
        return self.denoiser, self.model.vae, self.model.text_encoder

    @property
    def for_inpainting(self) -> bool:
        """Whether the denoiser also takes a mask and the masked picture."""
        return denoiser_channels(self.denoiser) == inpainting_channels(self.model.vae)

    def describe(self) -> str:
        """One line: what it is, what it predicts, how it was read."""
        kind = f"{kind_of(self.config, self.model.text_encoder.config.width)}{' for inpainting' * self.for_inpainting}"
        origin = (self.origin.precision, *self.origin.remarks) if self.origin else ()
        return ", ".join([kind, f"predicts {self.model.prediction} on path {self.model.path.kind}", *origin])


def kind_of(config: DenoiserConfig, context_width: int) -> str:
    if not isinstance(config, UNetConfig):
        return f"a DiT of {config.depth} blocks"
    standard = UNetConfig()
    sized = (config.block_out_channels, config.layers_per_block, config.attention_levels)
    if sized == (standard.block_out_channels, standard.layers_per_block, standard.attention_levels):
        versions = {(768, False): "Stable Diffusion 1", (1024, True): "Stable Diffusion 2"}
        return versions.get((context_width, config.use_linear_projection), "a U-Net of Stable Diffusion's size")
    return f"a U-Net of widths {'-'.join(map(str, config.block_out_channels))}"


def denoiser_channels(denoiser: nn.Module) -> int:
    """Channels that it takes, by its first convolution."""
    first = denoiser.get_submodule("conv_in" if isinstance(denoiser, UNet) else "pos_embed.proj")
    assert isinstance(first, nn.Conv2d)
    return first.in_channels


def inpainting_channels(vae: AutoencoderKL) -> int:
    """Latents, a mask, and the latents of the masked picture."""
    return 2 * vae.config.latent_channels + 1


def check_parts_fit(
    denoiser: LoadedDenoiser, vae: AutoencoderKL, text: TextEncoderConfig, tokenizer: Tokenizer, *, source: Path
) -> None:
    """Raise ValueError, naming both parts, if they were not made for each other."""
    latents = denoiser.in_channels
    if latents == inpainting_channels(vae):
        latents = vae.config.latent_channels
    for what, of_one, one, of_other, other in (
        ("latent channels", latents, "the denoiser", vae.config.latent_channels, "the autoencoder"),
        ("wide a context", denoiser.context_width, "the denoiser", text.width, "the text encoder"),
        ("tokens", tokenizer.vocab_size, "the tokenizer", text.vocab_size, "the text encoder"),
    ):
        if of_one != of_other:
            raise ValueError(
                f"{source}: {one} is made for {of_one} {what}, {other} for {of_other}: give a model whose parts "
                "belong together"
            )
