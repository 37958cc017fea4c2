"""Encode captions into a denoiser's condition: the only file that handles strings, tokenizers and text encoders.

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
    """One or more text towers, which encode captions into a Condition.

    Several towers encode the same captions; their token states and pooled vectors are joined along the width, as in
    SDXL, and the mask is that of the first. Raises ValueError for towers whose contexts differ in length, and for an
    encoder whose special tokens are not those of its tokenizer.
    """

    def __init__(self, *towers: TextTower) -> None:
        lengths = [tower.encoder.config.context_length for tower in towers]
        if len(set(lengths)) != 1:
            raise ValueError(f"the text encoders read {lengths} tokens, expected the same length for all: give others")
        for encoder, tokenizer in towers:
            config, ids = encoder.config, (tokenizer.config.pad_id, tokenizer.eos_id)
            if (config.pad_id, config.eos_id) != ids:
                raise ValueError(
                    f"the tokenizer ends captions with {ids[1]} and pads them with {ids[0]}, the text encoder with "
                    f"{config.eos_id} and {config.pad_id}: give a text encoder its own tokenizer"
                )
        self.towers = towers

    @property
    def width(self) -> int:
        """D, which denoisers call the context width."""
        return sum(tower.encoder.config.width for tower in self.towers)

    @property
    def context_length(self) -> int:
        """The maximum number of tokens."""
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
        """Split the captions, in order, into batches of at most `largest` with contexts of equal length."""
        tokenizer = self.towers[0].tokenizer
        chunks = [1 if weighting == "none" else chunk_count(tokenizer, caption) for caption in captions]
        alike = [
            [caption for caption, _ in group]
            for _, group in groupby(zip(captions, chunks, strict=True), lambda pair: pair[1])
        ]
        return [group[start : start + largest] for group in alike for start in range(0, len(group), largest)]

    def cut_off(self, caption: str) -> str:
        """Return the part of a caption beyond the text encoder's context length; "" if it fits."""
        return self.towers[0].tokenizer.cut_off(caption)


def _encode(tower: TextTower, captions: Sequence[str], weighting: str) -> TextCondition:
    encoder, tokenizer = tower
    device = next(encoder.parameters()).device
    if weighting == "a1111":
        return encode_weighted(encoder, tokenizer, captions, device)
    return encoder(tokenizer(captions).to(device))
