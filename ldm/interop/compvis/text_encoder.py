"""The text encoder of a single file, below cond_stage_model.: CLIP with the names of transformers or of open_clip."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.interop.identify import CONDITIONER, Shapes
from text.conversion import PREFIX, flattened, open_clip_to_transformers, transformers_to_open_clip
from text.encoder import TextEncoderConfig, TransformersTextEncoder
from text.tokenizer import EOS_ID

OPEN_CLIP, TRANSFORMERS = "model.", "transformer."
HEAD_WIDTH = 64  # of every CLIP; it does not follow from any shape
OPEN_CLIP_WIDTH = 1024  # of Stable Diffusion 2, in either layout
# Tensors whose shapes give the positions, the tokens and the width within a layer; and the pattern of layer names.
OPEN_CLIP_NAMES = (
    "positional_embedding",
    "token_embedding.weight",
    "transformer.resblocks.0.mlp.c_fc.weight",
    re.compile(r"transformer\.resblocks\.(\d+)\."),
)
TRANSFORMERS_NAMES = (
    "embeddings.position_embedding.weight",
    "embeddings.token_embedding.weight",
    "encoder.layers.0.mlp.fc1.weight",
    re.compile(r"encoder\.layers\.(\d+)\."),
)
MAX_LAYERS = 256  # limit, since the layers are built before the weights are compared
OPEN_CLIP_LAYERS = 24  # if all are present, the last is not used: Stable Diffusion 2 takes the states before it


class TextEncoderPlan(NamedTuple):
    """How a file stores the text encoder."""

    config: TextEncoderConfig
    wanted: dict[str, Tensor]  # names below cond_stage_model., and shapes (meta tensors), that it must have
    is_open_clip: bool

    def weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert the file's weights to those of CLIPTextModel, as views."""
        prefix = OPEN_CLIP if self.is_open_clip else TRANSFORMERS
        own = {name.removeprefix(prefix): tensors[CONDITIONER + name] for name in self.wanted}
        return open_clip_to_transformers(own) if self.is_open_clip else flattened(own)


def plan_text_encoder(shapes: Shapes, stated: TextEncoderConfig | None) -> TextEncoderPlan:
    """Plan how to load the text encoder. stated: the file's configuration; None: derive it from the shapes and
    Stable Diffusion's conventions.

    Raises ValueError for anything but CLIP, and KeyError with the name of a missing tensor.
    """
    is_open_clip = any(name.startswith(OPEN_CLIP) for name in shapes)
    if not is_open_clip and not any(".encoder.layers." in f".{name}" for name in shapes):
        known = sorted(shapes)[:3]
        raise ValueError(f"its text encoder is not a CLIP (cond_stage_model. has {', '.join(known) or 'nothing'})")
    prefix = OPEN_CLIP if is_open_clip else TRANSFORMERS
    if not is_open_clip and any(name.startswith(f"{TRANSFORMERS}{PREFIX}") for name in shapes):
        prefix = f"{TRANSFORMERS}{PREFIX}"
    config = stated or _from_shapes({name.removeprefix(prefix): shape for name, shape in shapes.items()}, is_open_clip)
    with torch.device("meta"):
        state = TransformersTextEncoder(config).model.state_dict()
    own = transformers_to_open_clip(state) if is_open_clip else flattened(state)
    return TextEncoderPlan(config, {prefix + name: tensor for name, tensor in own.items()}, is_open_clip)


def _from_shapes(shapes: Shapes, is_open_clip: bool) -> TextEncoderConfig:
    """Derive the configuration; names have no prefix. A tower of OpenCLIP's width is OpenCLIP's under either names."""
    positions, tokens, hidden, layer = OPEN_CLIP_NAMES if is_open_clip else TRANSFORMERS_NAMES
    length, width = shapes[positions]
    found = [int(match[1]) for name in shapes if (match := layer.match(name))]
    layers = min(1 + max(found, default=0), MAX_LAYERS)
    is_second = is_open_clip or width == OPEN_CLIP_WIDTH
    return TextEncoderConfig(
        width=width,
        layers=layers,
        heads=max(1, width // HEAD_WIDTH),
        intermediate_size=shapes[hidden][0],
        context_length=length,
        vocab_size=shapes[tokens][0],
        activation="gelu" if is_second else "quick_gelu",
        hidden="penultimate" if is_second and layers == OPEN_CLIP_LAYERS else "last",
        projection_dim=None,
        pad_id=0 if is_second else EOS_ID,
    )
