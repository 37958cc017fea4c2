"""CLIP text conditioning: one interface over transformers and open_clip, the tokenizer, their folders."""

from text.conversion import (
    load_text_encoder,
    open_clip_to_transformers,
    read_text_encoder_config,
    save_text_encoder,
    text_encoder_config_json,
    text_encoder_from_weights,
    transformers_to_open_clip,
)
from text.encoder import (
    OpenClipTextEncoder,
    TextCondition,
    TextEncoder,
    TextEncoderConfig,
    TransformersTextEncoder,
    open_clip_text_cfg,
)
from text.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, save_tokenizer

__all__ = [
    "OpenClipTextEncoder",
    "TextCondition",
    "TextEncoder",
    "TextEncoderConfig",
    "Tokenizer",
    "TokenizerConfig",
    "TransformersTextEncoder",
    "load_text_encoder",
    "load_tokenizer",
    "open_clip_text_cfg",
    "open_clip_to_transformers",
    "read_text_encoder_config",
    "save_text_encoder",
    "save_tokenizer",
    "text_encoder_config_json",
    "text_encoder_from_weights",
    "transformers_to_open_clip",
]
