"""CLIP text conditioning: one interface over transformers and open_clip, the tokenizer, prompt weights, folders."""

from text.conversion import load_text_encoder, open_clip_to_transformers, save_text_encoder, transformers_to_open_clip
from text.encoder import OpenClipTextEncoder, TextCondition, TextEncoder, TextEncoderConfig, TransformersTextEncoder
from text.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer, save_tokenizer
from text.weighting import encode_weighted, parse_weights

__all__ = [
    "OpenClipTextEncoder", "TextCondition", "TextEncoder", "TextEncoderConfig", "Tokenizer", "TokenizerConfig",
    "TransformersTextEncoder", "encode_weighted", "load_text_encoder", "load_tokenizer", "open_clip_to_transformers",
    "parse_weights", "save_text_encoder", "save_tokenizer", "transformers_to_open_clip",
]  # fmt: skip
