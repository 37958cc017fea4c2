"""The contract of all denoisers: what they are told, what they answer, and what they say of themselves.

Legend: B batch, C latent channels, c further channels, H x W latent size, L context tokens, D and P widths.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn


class Condition(NamedTuple):
    """Everything that a network is told about its samples besides x_t and t. None: the model has no such input.

    A new kind of input is one field here; whoever makes and reads it knows it, nobody between them does.
    """

    context: Tensor  # B x L x D token states, of one text encoder or of several joined
    mask: Tensor  # B x L bool, True for a real token; each row has one at least
    pooled: Tensor  # B x P, one vector for the whole text
    concat: Tensor | None = None  # B x c x H x W, channels next to x_t (inpainting: the mask and the masked latents)

    def to(self, dtype: torch.dtype) -> Condition:
        """The same with its numbers in this precision."""
        concat = None if self.concat is None else self.concat.to(dtype)
        return Condition(self.context.to(dtype), self.mask, self.pooled.to(dtype), concat)


class Output(NamedTuple):
    """What a network answers."""

    prediction: Tensor  # like x_t: what the objective asks for, eps, v, x0, velocity or F
    variance: Tensor | None = None  # like x_t, about -1 to 1: where the variance of DDPM's step lies in its range


class Channels:
    """The channels that a denoiser sees and answers, counted from the three numbers that it is built with."""

    latent_channels: int
    concat_channels: int  # of Condition.concat
    learned_variance: bool  # whether the answer has a variance

    @property
    def in_channels(self) -> int:
        return self.latent_channels + self.concat_channels

    @property
    def out_channels(self) -> int:
        return (1 + self.learned_variance) * self.latent_channels


class Denoiser(Channels, nn.Module, ABC):
    """A network that sees noisy latents, a time and a condition. A fresh one predicts exactly zero."""

    def __init__(self, *, latent_channels: int, concat_channels: int = 0, learned_variance: bool = False) -> None:
        super().__init__()
        self.latent_channels, self.concat_channels = latent_channels, concat_channels
        self.learned_variance = learned_variance

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Output:
        """Predict a tensor like x, in its shape and dtype.

        x B x C x H x W latents. t B float timesteps in 0..1000, the scale of the sinusoidal embedding: the caller maps
        a path's times in [0, 1] to it.
        """

    def with_concat(self, x: Tensor, condition: Condition) -> Tensor:
        """x with the condition's channels next to its own: B x in_channels x H x W."""
        return x if condition.concat is None else torch.cat([x, condition.concat], dim=1)

    def answer(self, channels: Tensor) -> Output:
        """The last layer's channels, B x out_channels x H x W, as prediction and, if learned, variance."""
        return Output(*channels.chunk(2, dim=1)) if self.learned_variance else Output(channels)


class DenoiserFacts(ABC):
    """What a denoiser's configuration says of the network. Nobody else asks which kind of network it is."""

    can_learn_variance: ClassVar[bool] = False  # whether other programs open such a network

    @property
    def stride(self) -> int:
        """The sides of its latents are multiples of this."""
        return 1

    @property
    def native_side(self) -> int | None:
        """Side of the latents that it is made for; None: it has none of its own."""
        return None

    @abstractmethod
    def attention_length(self, side: int) -> int:
        """Tokens of the longest self-attention over latents of side x side."""

    @abstractmethod
    def describe(self, context_width: int) -> str:
        """A few words for people: "a DiT of 12 blocks"."""

    @abstractmethod
    def build(
        self, *, latent_channels: int, context_width: int, concat_channels: int = 0, learned_variance: bool = False
    ) -> Denoiser:
        """Build a fresh network.

        latent_channels follow from the autoencoder, context_width from the text encoder. learned_variance: with a
        second answer, which says how wide a step of DDPM scatters.
        """
