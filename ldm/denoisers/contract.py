"""The interface of all denoisers: their inputs, their outputs, and the properties of their configurations.

Legend: B batch, C latent channels, c additional channels, H x W latent size, L context tokens, D and P widths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, NotRequired, TypedDict, Unpack

import torch
from torch import Tensor, nn


class Condition(NamedTuple):
    """All inputs of a network in addition to x_t and t. None: the model has no such input.

    A new kind of input is one field here, known only to the code that creates it and the code that reads it.
    """

    context: Tensor  # B x L x D token states, of one text encoder or of several joined
    mask: Tensor  # B x L bool, True for a real token; each row has at least one
    pooled: Tensor  # B x P, one vector for the complete text
    concat: Tensor | None = None  # B x c x H x W, channels next to x_t (inpainting: the mask and the masked latents)

    def to(self, dtype: torch.dtype) -> Condition:
        """Convert the float tensors to this precision."""
        concat = None if self.concat is None else self.concat.to(dtype)
        return Condition(self.context.to(dtype), self.mask, self.pooled.to(dtype), concat)


class Output(NamedTuple):
    """The outputs of a network."""

    prediction: Tensor  # like x_t: the objective's target, eps, v, x0, velocity or F
    variance: Tensor | None = None  # like x_t, about -1 to 1: position of the variance of DDPM's step in its range


class Sizes(TypedDict):
    """The properties of a network that follow from the model around it."""

    latent_channels: int  # of the autoencoder
    context_width: int  # of the text encoder
    concat_channels: NotRequired[int]  # of Condition.concat; by default none
    learned_variance: NotRequired[bool]  # add a second output, for the variance of DDPM's step


class Channels:
    """The channels that a denoiser takes and returns, counted from the three settings it is built with."""

    latent_channels: int
    concat_channels: int  # of Condition.concat
    learned_variance: bool  # whether the output has a variance

    @property
    def in_channels(self) -> int:
        return self.latent_channels + self.concat_channels

    @property
    def out_channels(self) -> int:
        return (1 + self.learned_variance) * self.latent_channels


class Denoiser(Channels, nn.Module, ABC):
    """A network that takes noisy latents, a time and a condition. A fresh one predicts exactly zero."""

    def __init__(self, **sizes: Unpack[Sizes]) -> None:
        super().__init__()
        self.latent_channels, self.concat_channels = sizes["latent_channels"], sizes.get("concat_channels", 0)
        self.learned_variance = sizes.get("learned_variance", False)

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Output:
        """Predict a tensor like x, in its shape and dtype.

        x B x C x H x W latents. t B float timesteps in 0..1000, the scale of the sinusoidal embedding: the caller maps
        a path's times in [0, 1] to it.
        """

    def with_concat(self, x: Tensor, condition: Condition) -> Tensor:
        """Concatenate x with the condition's additional channels: B x in_channels x H x W."""
        return x if condition.concat is None else torch.cat([x, condition.concat], dim=1)

    def answer(self, channels: Tensor) -> Output:
        """Split the last layer's channels, B x out_channels x H x W, into prediction and, if learned, variance."""
        return Output(*channels.chunk(2, dim=1)) if self.learned_variance else Output(channels)


class DenoiserFacts(ABC):
    """The properties of a network that its configuration provides. No other code depends on the kind of network."""

    can_learn_variance: ClassVar[bool] = False  # whether other programs open such a network

    @property
    def stride(self) -> int:
        """The factor that must divide the sides of the latents."""
        return 1

    @property
    def native_side(self) -> int | None:
        """The side of the latents that it is made for; None: any."""
        return None

    @abstractmethod
    def attention_length(self, side: int) -> int:
        """Return the number of tokens of the longest self-attention for latents of side x side."""

    @abstractmethod
    def describe(self, context_width: int) -> str:
        """Describe the network in a few words: "a DiT of 12 blocks"."""

    @abstractmethod
    def build(self, **sizes: Unpack[Sizes]) -> Denoiser:
        """Build a fresh network."""
