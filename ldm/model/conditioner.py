"""From captions to what a denoiser is told: the one place that knows of strings, tokenizers and text encoders.

B captions, L tokens, D width of the joined states, P width of the joined pooled vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch

from ldm.denoisers import Condition
from text.encoder import TextCondition, TextEncoder
from text.tokenizer import Tokenizer
from text.weighting import chunk_count, encode_weighted


class TextTower(NamedTuple):
    """A text encoder and the tokenizer that it was trained with."""

    encoder: TextEncoder
    tokenizer: Tokenizer


class Conditioner:
    """One or more text towers: captions -> Condition.

    Of several, which read the same captions, token states and pooled vectors are joined along their width, as in SDXL;
    the mask is the first one's. Raises ValueError for towers whose contexts differ in length.
    """

    def __init__(self, *towers: TextTower) -> None:
        lengths = [tower.encoder.config.context_length for tower in towers]
        if len(set(lengths)) != 1:
            raise ValueError(f"the text encoders read {lengths} tokens, expected one length for all: give others")
        self.towers = towers

    @property
    def width(self) -> int:
        """D, what a denoiser calls its context width."""
        return sum(tower.encoder.config.width for tower in self.towers)

    @property
    def context_length(self) -> int:
        """The most tokens that are read."""
        return self.towers[0].encoder.config.context_length

    @property
    def encoders(self) -> tuple[TextEncoder, ...]:
        return tuple(tower.encoder for tower in self.towers)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], weighting: str = "none") -> Condition:
        """Encode captions, on the encoders' device. weighting: see text.weighting."""
        parts = [_encode(tower, captions, weighting) for tower in self.towers]
        if len(parts) == 1:
            (only,) = parts
            return Condition(only.context, only.mask, only.pooled)
        context, pooled = (torch.cat(own, dim=-1) for own in zip(*((p.context, p.pooled) for p in parts), strict=True))
        return Condition(context, parts[0].mask, pooled)

    def batches(self, captions: Sequence[str], weighting: str, *, largest: int) -> list[list[str]]:
        """The captions in order, in batches of at most `largest` whose contexts are equally long."""
        tokenizer = self.towers[0].tokenizer
        chunks = [1 if weighting == "none" else chunk_count(tokenizer, caption) for caption in captions]
        alike = [
            [caption for caption, _ in group]
            for _, group in groupby(zip(captions, chunks, strict=True), lambda pair: pair[1])
        ]
        return [group[start : start + largest] for group in alike for start in range(0, len(group), largest)]

    def cut_off(self, caption: str) -> str:
        """The end of a caption that is longer than the text encoder can read; "" if all of it is read."""
        return self.towers[0].tokenizer.cut_off(caption)


def _encode(tower: TextTower, captions: Sequence[str], weighting: str) -> TextCondition:
    encoder, tokenizer = tower
    device = next(encoder.parameters()).device
    if weighting == "a1111":
        return encode_weighted(encoder, tokenizer, captions, device)
    return encoder(tokenizer(captions).to(device))
