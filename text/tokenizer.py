"""CLIP's byte-pair tokenizer: captions -> token ids, without a download or importing open_clip.

The vocabulary is read from open_clip's package. The `tokenizers` library encodes with the same pipeline as
transformers' CLIPTokenizer, and gives exactly the same ids.
Shapes: B captions, L context length.
"""

import gzip
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from ldm.files.atomic import write_atomically
from ldm.files.strict_json import read_json, read_text, write_json

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
BOS_ID, EOS_ID = 49406, 49407

# Radford et al. 2021, section 2.3: contractions, runs of letters, single digits, runs of anything else.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_MERGES = 49152 - 256 - 2  # CLIP uses the first 48,894 of the 262,144 merges in open_clip's file
_MAX_FILE_BYTES = 32 * 2**20  # a CLIP tokenizer.json has 2 to 4 MB
_MISSING = (
    "is missing; a CLIP tokenizer folder has tokenizer_config.json and tokenizer.json, or vocab.json and merges.txt"
)


class Vocabulary(NamedTuple):
    """Token strings with their ids, and the byte-pair merges by rank."""

    ids: dict[str, int]
    merges: list[tuple[str, str]]


def clip_vocabulary() -> Vocabulary:
    """Read CLIP's 49,408 tokens from open_clip's package, which is located but not imported.

    Raises ModuleNotFoundError if open_clip is not installed.
    """
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("CLIP's vocabulary is part of open_clip: pip install open_clip_torch")
    path = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n", 1 + _MERGES)
    merges = [_merge(line) for line in lines[1 : 1 + _MERGES]]
    letters = _byte_letters()
    tokens = letters + [letter + "</w>" for letter in letters] + [a + b for a, b in merges] + [BOS, EOS]
    return Vocabulary({token: i for i, token in enumerate(tokens)}, merges)


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Context length and padding id: 49407 in Hugging Face and Stable Diffusion 1, 0 in open_clip and SD 2.

    Prefer 49407. Id 0 is the token "!", and a token used for padding is not merged into words: as in transformers,
    each "!" of a caption then becomes id 0, whereas open_clip, and A1111 and ComfyUI with it, read "!" as 256 and "!!!"
    as 995, as do the tokens with `original=True`.
    """

    context_length: int = 77
    pad_id: int = EOS_ID

    def __post_init__(self) -> None:
        if self.context_length < 3:
            raise ValueError(f"context_length={self.context_length} leaves no room between BOS and EOS; use 3 or more")
        if self.pad_id < 0:
            raise ValueError(f"pad_id={self.pad_id} is negative; use {EOS_ID} (Hugging Face) or 0 (open_clip)")


class Tokens(NamedTuple):
    """The ids of a text, and the place in it where each of them starts."""

    ids: list[int]
    starts: list[int]


class Tokenizer:
    """A picklable callable: captions -> ids B x L (int64) as BOS, tokens, EOS, padding.

    A caption that is too long is truncated before the EOS; `cut_off` returns the truncated text.
    """

    def __init__(self, config: TokenizerConfig, vocabulary: Vocabulary | None = None) -> None:
        self.config = config
        ids, merges = vocabulary or clip_vocabulary()
        _check_ids(ids)
        if config.pad_id >= len(ids):
            raise ValueError(f"pad_id={config.pad_id} is outside the vocabulary of {len(ids)} tokens; use {ids[EOS]}")
        self.vocab_size = len(ids)
        self.bos_id, self.eos_id = ids[BOS], ids[EOS]
        pad = next(token for token, i in ids.items() if i == config.pad_id)
        self._bpe = _byte_pair_encoder(ids, merges, pad)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokenize captions to B x L. Raises TypeError for a bare string, ValueError for invalid Unicode."""
        if isinstance(texts, str):
            raise TypeError("expected a list of captions, got one string; write tokenizer([text])")
        result = torch.full((len(texts), self.config.context_length), self.config.pad_id)
        for row, text in zip(result, texts, strict=True):
            ids = [self.bos_id, *self.token_ids(text)[: self.config.context_length - 2], self.eos_id]
            row[: len(ids)] = torch.tensor(ids)
        return result  # B, L

    def token_ids(self, text: str) -> list[int]:
        """Tokenize the text alone, without truncation. Raises ValueError for text that is not valid Unicode."""
        return self._encode(text).ids

    def tokens(self, text: str, *, original: bool = False) -> Tokens:
        """Tokenize the text alone, without truncation. original: as open_clip's tokenizer, which merges the padding
        token into words. Raises ValueError for text that is not valid Unicode.
        """
        encoding = self._encode(text, original=original)
        return Tokens(encoding.ids, [start for start, _ in encoding.offsets])

    def cut_off(self, text: str) -> str:
        """Return the end of the text that does not fit into the context, or ""."""
        starts, limit = self.tokens(text).starts, self.config.context_length - 2
        return text[starts[limit] :] if len(starts) > limit else ""

    def to_json(self) -> dict[str, Any]:
        """Build the content of a Hugging Face tokenizer.json, with the vocabulary in order of id."""
        return json.loads(self._bpe.to_str())

    @cached_property
    def _original(self) -> tokenizers.Tokenizer:
        """The encoder without the padding token among the special ones."""
        document = self.to_json()
        special = (self.bos_id, self.eos_id)
        document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] in special]
        return tokenizers.Tokenizer.from_str(json.dumps(document))

    def _encode(self, text: str, *, original: bool = False) -> tokenizers.Encoding:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of a caption is the lone surrogate U+{ord(text[error.start]):04X};"
                " decode the caption's bytes as UTF-8"
            ) from error
        # One text at a time: the batch call starts threads, which break when a data loader forks.
        return (self._original if original else self._bpe).encode(text, add_special_tokens=False)


def mask_to_eos(ids: Tensor, eos_id: int) -> Tensor:
    """Mask the ids up to and including the first EOS of each row, or the full row without one; B x L bool."""
    is_eos = ids == eos_id  # B, L
    return is_eos.cumsum(dim=-1) - is_eos.long() == 0  # B, L


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write the five files that transformers 4 and 5 load as a CLIPTokenizer; the bytes are reproducible."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    document = tokenizer.to_json()
    vocab, merges = document["model"]["vocab"], document["model"]["merges"]
    pad = next(token for token, i in vocab.items() if i == tokenizer.config.pad_id)
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": pad, "unk_token": EOS}
    limits = {"model_max_length": tokenizer.config.context_length, "tokenizer_class": "CLIPTokenizer"}
    config = {"add_prefix_space": False, **special, **limits}
    write_json(document, folder / "tokenizer.json", indent=None, ensure_ascii=False)
    write_json(vocab, folder / "vocab.json", indent=None, ensure_ascii=False)
    write_json(special, folder / "special_tokens_map.json", ensure_ascii=False)
    write_json(config, folder / "tokenizer_config.json", ensure_ascii=False)
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    write_atomically(folder / "merges.txt", ("\n".join(lines) + "\n").encode())


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load a CLIP tokenizer folder, ours or of transformers 4 or 5; nothing in it is executed.

    Raises FileNotFoundError for a missing file; ValueError for a folder that is not a CLIP tokenizer, or that adds
    tokens to the vocabulary (textual inversion).
    """
    folder = Path(folder)
    try:
        return _read_tokenizer(folder)
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # JSON of a different structure
        raise ValueError(f"{folder} is not a CLIP tokenizer: {error!r}") from error


def _read_tokenizer(folder: Path) -> Tokenizer:
    settings = _read_json(folder / "tokenizer_config.json")
    roles = ("bos_token", "eos_token", "pad_token")
    special = {key: settings[key] for key in roles if settings.get(key)}
    # Stable Diffusion 2 gives its padding token only in special_tokens_map.json. In newer folders, which have
    # added_tokens_decoder, tokenizer_config.json takes precedence, as in transformers.
    if "added_tokens_decoder" not in settings and (folder / "special_tokens_map.json").is_file():
        special |= _read_json(folder / "special_tokens_map.json")
    names = {key: _token_name(value) for key, value in special.items() if key in roles}
    vocabulary, added = _read_vocabulary(folder)
    added |= {_token_name(token) for token in settings.get("added_tokens_decoder", {}).values()}
    pad = names.get("pad_token", EOS)
    if names.get("bos_token", BOS) != BOS or names.get("eos_token", EOS) != EOS or pad not in vocabulary.ids:
        raise ValueError(f"{folder} is not a CLIP tokenizer: its special tokens are {names}")
    if extra := sorted(added - {BOS, EOS, pad}):
        raise ValueError(f"{folder} adds {len(extra)} tokens to CLIP's, which is not supported: {extra[:5]}")
    limit = settings.get("model_max_length")
    # transformers writes int(1e30) if no limit was set; every Stable Diffusion encoder has 77 positions.
    length = limit if isinstance(limit, int) and limit < 10**6 else 77
    return Tokenizer(TokenizerConfig(context_length=length, pad_id=vocabulary.ids[pad]), vocabulary)


def _byte_pair_encoder(ids: dict[str, int], merges: list[tuple[str, str]], pad: str) -> tokenizers.Tokenizer:
    try:
        model = models.BPE(ids, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=EOS)
    except Exception as error:  # the Rust library raises plain Exception
        raise ValueError(f"the merges do not fit the vocabulary: {error}") from error
    encoder = tokenizers.Tokenizer(model)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    encoder.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True)
    encoder.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    encoder.post_processor = processors.RobertaProcessing(
        (EOS, ids[EOS]), (BOS, ids[BOS]), trim_offsets=False, add_prefix_space=False
    )
    encoder.decoder = decoders.ByteLevel()
    encoder.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, pad)])
    return encoder


def _byte_letters() -> list[str]:
    """Map each byte to a letter, printable ones first; the others get letters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _merge(line: str) -> tuple[str, str]:
    left, _, right = line.rstrip("\r\n").partition(" ")
    return left, right


def _check_ids(ids: dict[str, int]) -> None:
    if BOS not in ids or EOS not in ids:
        raise ValueError(f"the vocabulary lacks {BOS} or {EOS}; is it CLIP's?")
    if set(ids.values()) != set(range(len(ids))):
        raise ValueError(f"the ids of a vocabulary of {len(ids)} tokens must be 0 to {len(ids) - 1}, each once")


def _read_vocabulary(folder: Path) -> tuple[Vocabulary, set[str]]:
    """Read the vocabulary and the names of added tokens, from tokenizer.json or else transformers 4's files."""
    if (folder / "tokenizer.json").is_file():
        document = _read_json(folder / "tokenizer.json")
        model = document.get("model")
        if not isinstance(model, dict) or not isinstance(model.get("merges"), list):
            raise ValueError(f"{folder / 'tokenizer.json'} holds no byte-pair encoding; is it CLIP's?")
        merges = [_merge(pair) if isinstance(pair, str) else (str(pair[0]), str(pair[1])) for pair in model["merges"]]
        ids = model.get("vocab")
        added = {_token_name(token) for token in document.get("added_tokens", [])}
    else:
        ids = _read_json(folder / "vocab.json")
        lines = read_text(folder / "merges.txt", most=_MAX_FILE_BYTES, missing=_MISSING).split("\n")
        merges = [_merge(line) for line in (lines[1:] if lines[0].startswith("#version") else lines) if line]
        added = set(_read_json(folder / "added_tokens.json")) if (folder / "added_tokens.json").is_file() else set()
    if not isinstance(ids, dict) or not all(isinstance(i, int) for i in ids.values()):
        raise ValueError(f"the vocabulary in {folder} is not a table of tokens and ids")
    return Vocabulary(ids, merges), added


def _token_name(token: Any) -> str:
    """Read a special token, stored as a string or as an object with the string in `content`."""
    return str(token["content"] if isinstance(token, dict) else token)


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, most=_MAX_FILE_BYTES, missing=_MISSING)
