"""The text encoder of a single file, below cond_stage_model.: CLIP as transformers or as open_clip names it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.interop.layouts import CONDITIONER, Shapes
from text import (
    TextEncoderConfig,
    TransformersTextEncoder,
    flattened,
    open_clip_to_transformers,
    transformers_to_open_clip,
)
from text.tokenizer import EOS_ID

OPEN_CLIP, TRANSFORMERS = "model.", "transformer."
HEAD_WIDTH = 64  # of every CLIP; no shape tells of it
OPEN_CLIP_WIDTH = 1024  # of Stable Diffusion 2, in whichever layout
OPEN_CLIP_LAYERS = 24  # if all are there, the last is not asked: Stable Diffusion 2 takes the states before it


class Conditioner(NamedTuple):
    """How the text encoder stands in a file."""

    config: TextEncoderConfig
    wanted: dict[str, Tensor]  # names below cond_stage_model., and shapes (meta tensors), that it must have
    is_open_clip: bool

    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """CLIPTextModel's, as views, from those of the file."""
        prefix = OPEN_CLIP if self.is_open_clip else TRANSFORMERS
        own = {name.removeprefix(prefix): tensors[CONDITIONER + name] for name in self.wanted}
        return open_clip_to_transformers(own) if self.is_open_clip else flattened(own)


def find_conditioner(shapes: Shapes, told: TextEncoderConfig | None) -> Conditioner:
    """told: the configuration, where the file has it; else it follows from the shapes and Stable Diffusion's habits.

    Raises ValueError for anything but CLIP, KeyError, naming it, for a tensor that is missing.
    """
    is_open_clip = any(name.startswith(OPEN_CLIP) for name in shapes)
    if not is_open_clip and not any(".encoder.layers." in f".{name}" for name in shapes):
        known = sorted(shapes)[:3]
        raise ValueError(f"its text encoder is no CLIP (cond_stage_model. has {', '.join(known) or 'nothing'})")
    prefixed = not is_open_clip and any(name.startswith(f"{TRANSFORMERS}text_model.") for name in shapes)
    config = told or (_from_open_clip(shapes) if is_open_clip else _from_transformers(shapes, prefixed=prefixed))
    with torch.device("meta"):
        state = TransformersTextEncoder(config).model.state_dict()
    if is_open_clip:
        wanted = {OPEN_CLIP + name: tensor for name, tensor in transformers_to_open_clip(state).items()}
    else:
        inner = "text_model." * prefixed
        wanted = {f"{TRANSFORMERS}{inner}{name}": tensor for name, tensor in flattened(state).items()}
    return Conditioner(config, wanted, is_open_clip)


def _from_open_clip(shapes: Shapes) -> TextEncoderConfig:
    length, width = shapes[f"{OPEN_CLIP}positional_embedding"]
    layers = _count(shapes, r"model\.transformer\.resblocks\.(\d+)\.")
    return TextEncoderConfig(
        width=width,
        layers=layers,
        heads=max(1, width // HEAD_WIDTH),
        intermediate_size=shapes[f"{OPEN_CLIP}transformer.resblocks.0.mlp.c_fc.weight"][0],
        context_length=length,
        vocab_size=shapes[f"{OPEN_CLIP}token_embedding.weight"][0],
        activation="gelu",
        hidden="penultimate" if layers == OPEN_CLIP_LAYERS else "last",
        projection_dim=None,
        pad_id=0,
    )


def _from_transformers(shapes: Shapes, *, prefixed: bool) -> TextEncoderConfig:
    inner = f"{TRANSFORMERS}{'text_model.' * prefixed}"
    length, width = shapes[f"{inner}embeddings.position_embedding.weight"]
    layers = _count(shapes, re.escape(inner) + r"encoder\.layers\.(\d+)\.")
    is_second = width == OPEN_CLIP_WIDTH
    return TextEncoderConfig(
        width=width,
        layers=layers,
        heads=max(1, width // HEAD_WIDTH),
        intermediate_size=shapes[f"{inner}encoder.layers.0.mlp.fc1.weight"][0],
        context_length=length,
        vocab_size=shapes[f"{inner}embeddings.token_embedding.weight"][0],
        activation="gelu" if is_second else "quick_gelu",
        hidden="penultimate" if is_second and layers == OPEN_CLIP_LAYERS else "last",
        projection_dim=None,
        pad_id=0 if is_second else EOS_ID,
    )


def _count(shapes: Shapes, pattern: str) -> int:
    found = [int(match[1]) for name in shapes if (match := re.match(pattern, name))]
    return min(1 + max(found, default=0), 256)
