"""CLIP text conditioning: one interface over transformers and open_clip, the tokenizer, prompt weights, folders."""

from text.conversion import (
    flattened,
    load_text_encoder,
    open_clip_to_transformers,
    prefixed_weights,
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
from text.weighting import (
    Piece,
    WeightedPrompt,
    check_weights,
    chunk_count,
    encode_weighted,
    parse_weights,
    tokenize_weighted,
)

__all__ = [
    "OpenClipTextEncoder",
    "Piece",
    "TextCondition",
    "TextEncoder",
    "TextEncoderConfig",
    "Tokenizer",
    "TokenizerConfig",
    "TransformersTextEncoder",
    "WeightedPrompt",
    "check_weights",
    "chunk_count",
    "encode_weighted",
    "flattened",
    "load_text_encoder",
    "load_tokenizer",
    "open_clip_text_cfg",
    "open_clip_to_transformers",
    "parse_weights",
    "prefixed_weights",
    "read_text_encoder_config",
    "save_text_encoder",
    "save_tokenizer",
    "text_encoder_config_json",
    "text_encoder_from_weights",
    "tokenize_weighted",
    "transformers_to_open_clip",
]
