"""CLIP text conditioning: one interface over transformers and open_clip, the tokenizer, prompt weights, folders.

The form "import X as X" marks what is offered to users.
"""

from text.conversion import flattened as flattened
from text.conversion import load_text_encoder as load_text_encoder
from text.conversion import open_clip_to_transformers as open_clip_to_transformers
from text.conversion import prefixed_weights as prefixed_weights
from text.conversion import read_text_encoder_config as read_text_encoder_config
from text.conversion import save_text_encoder as save_text_encoder
from text.conversion import text_encoder_config_json as text_encoder_config_json
from text.conversion import text_encoder_from_weights as text_encoder_from_weights
from text.conversion import transformers_to_open_clip as transformers_to_open_clip
from text.encoder import OpenClipTextEncoder as OpenClipTextEncoder
from text.encoder import TextCondition as TextCondition
from text.encoder import TextEncoder as TextEncoder
from text.encoder import TextEncoderConfig as TextEncoderConfig
from text.encoder import TransformersTextEncoder as TransformersTextEncoder
from text.encoder import open_clip_text_cfg as open_clip_text_cfg
from text.tokenizer import Tokenizer as Tokenizer
from text.tokenizer import TokenizerConfig as TokenizerConfig
from text.tokenizer import load_tokenizer as load_tokenizer
from text.tokenizer import save_tokenizer as save_tokenizer
from text.weighting import Piece as Piece
from text.weighting import WeightedPrompt as WeightedPrompt
from text.weighting import check_weights as check_weights
from text.weighting import chunk_count as chunk_count
from text.weighting import encode_weighted as encode_weighted
from text.weighting import parse_weights as parse_weights
from text.weighting import tokenize_weighted as tokenize_weighted
