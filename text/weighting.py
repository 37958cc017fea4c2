"""Weight prompts and split long ones as in AUTOMATIC1111's web UI ("A1111"), with its "original" emphasis.

`(x)` multiplies the weight by 1.1, `[x]` divides it by 1.1, `(x:1.3)` multiplies it by 1.3; nested factors multiply. A
backslash escapes a bracket or backslash, and `BREAK` starts a new chunk. Text is tokenized as there: for Stable
Diffusion 2 by open_clip's rules, where "!" is a word. Prompt editing, `[a:b:0.5]` and `[a|b]`, precedes all this: see
text.schedule. Shapes: B prompts, K chunks per prompt, L context length, D width.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from text.embeddings import EmbeddingTable
from text.encoder import TextCondition, TextEncoder
from text.prompt_syntax import without_tags
from text.schedule import compose, prompt_schedule
from text.tokenizer import Tokenizer

MAX_WEIGHT = 100.0  # of either sign
MAX_CHUNKS = 64  # per prompt
COMMA_REACH = 20  # tokens before the end of a chunk in which a comma moves the text after it to the next

_STEP = 1.1  # factor of a pair of brackets without a number
_MAX_STEPS = 7000  # 1.1**7000 is 1e289, above MAX_WEIGHT; far larger powers raise OverflowError

# Each repetition stops at the first character that it cannot match, so the search is linear in the prompt.
_SYNTAX = re.compile(
    r"""
    \\ (?P<escaped> [()\[\]\\]?)                                    # alone, a backslash is dropped
    | \b (?P<cut> BREAK ) \b
    | (?P<open> [(\[] )
    | (?P<close> (?: : \s* (?P<number> [+-]? (?: \d+ (?: \.\d* )? | \.\d+ ) ) \s* )? \) | \] )
    | (?P<text> [^\\()\[\]:B]+ | [:B] )
    """,
    re.VERBOSE,
)

_Chunk = list[tuple[int, float]]  # (token id, weight), without BOS, EOS and padding


class Piece(NamedTuple):
    """A piece of plain text, and its weight."""

    text: str
    weight: float


class WeightedPrompt(NamedTuple):
    """Chunks of token ids, each BOS, tokens, EOS, padding; BOS, EOS and padding have weight 1."""

    ids: Tensor  # K, L: int64
    weights: Tensor  # K, L: float32


def parse_weights(prompt: str) -> list[list[Piece]]:
    """Parse a prompt into sections, separated by BREAK, and their pieces: at least one section, which may be empty.

    BREAK must be upper case and a separate word. As in A1111, an unclosed bracket extends to the end of the prompt, an
    unmatched closing one is text, round and square ones may overlap, a number is read only before `)`, and a backslash
    that escapes nothing is dropped. Unlike in A1111, BREAK also works within brackets. Adjacent text of equal weight
    is one piece. Raises ValueError for a weight outside -100 to 100.
    """
    sections: list[list[tuple[str, float]]] = [[]]
    for text, weight in _weighted_text(prompt):
        if text is None:
            sections.append([])
        elif text:
            sections[-1].append((text, weight))
    return [_merge(section) for section in sections]


def check_prompt(prompt: str, steps: int) -> None:
    """Raise ValueError if a text of a prompt that may have tags, several parts and changes has a weight out of range,
    or a tag a strength that is no number."""
    for part in compose(without_tags(prompt, all_kinds=True).text):
        for text in {segment.text for segment in prompt_schedule(part.text, steps)}:
            parse_weights(text)


def chunk_count(tokenizer: Tokenizer, prompt: str, embeddings: EmbeddingTable | None = None) -> int:
    """Count the chunks K of a prompt, at least 1; prompts of equal K can be encoded together without padding."""
    return len(_chunks(tokenizer, prompt, embeddings))


def tokenize_weighted(tokenizer: Tokenizer, prompt: str, embeddings: EmbeddingTable | None = None) -> WeightedPrompt:
    """Tokenize to ids and weights, K x L each; without weights, in one chunk, the ids equal `tokenizer([prompt])`, but
    for "!" where it is the padding.

    Pieces are tokenized separately. A chunk has `context_length` - 2 tokens; a phrase that would be split moves to the
    next chunk if it begins, after a comma, within the last 20 tokens. An embedding is not split. Raises ValueError for
    a weight outside -100 to 100, for more than 64 chunks and for text that is not valid Unicode.
    """
    return _tensors(tokenizer, _chunks(tokenizer, prompt, embeddings))


def encode_weighted(
    encoder: TextEncoder,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    device: torch.device | str,
    *,
    embeddings: EmbeddingTable | None = None,
    clip_skip: int | None = None,
) -> TextCondition:
    """Encode weighted prompts: context B x (K L) x D, mask B x (K L), pooled B x D of the first chunks.

    K is that of the longest prompt; the others are padded with empty chunks, as in A1111, which changes their context:
    if that matters, batch prompts of equal `chunk_count`. `device` is the encoder's. clip_skip: see TextEncoder. Raises
    TypeError for a bare string; ValueError for an empty list, and if `tokenize_weighted` does.
    """
    if isinstance(prompts, str):
        raise TypeError("expected a list of prompts, got one string; write [prompt]")
    if not prompts:
        raise ValueError("there are no prompts to encode; give at least one, which may be empty")
    chunked = [_chunks(tokenizer, prompt, embeddings) for prompt in prompts]
    count = max(len(chunks) for chunks in chunked)
    padded = [chunk for chunks in chunked for chunk in chunks + [[]] * (count - len(chunks))]
    ids, weights = _tensors(tokenizer, padded)  # B K, L
    extra = embeddings and embeddings.vectors
    context, pooled, mask = encoder(ids.to(device), extra=extra, clip_skip=clip_skip)  # B K, L, D; B K, D; B K, L
    context = emphasize(context, weights.to(device))  # B K, L, D
    batch, width = len(prompts), context.shape[-1]
    return TextCondition(context.reshape(batch, -1, width), pooled[::count], mask.reshape(batch, -1))


def emphasize(context: Tensor, weights: Tensor) -> Tensor:
    """Multiply states B x L x D by weights B x L, then rescale each row to its previous mean over L x D values.

    A row with all weights 1 is returned unchanged, bit for bit. Two differences from A1111: it takes the mean over the
    full batch, so that a picture would depend on its neighbours; and it divides by any mean, whereas here a row whose
    mean before or after is only rounding error keeps its weighted states.
    """
    weighted = context * weights[..., None]  # B, L, D; float32 or wider
    states = context.to(weighted.dtype)
    before = states.mean(dim=(1, 2), keepdim=True)  # B, 1, 1
    after = weighted.mean(dim=(1, 2), keepdim=True)  # B, 1, 1
    rounding = 1e-4 * states.abs().mean(dim=(1, 2), keepdim=True)  # B, 1, 1: more than bfloat16's
    usable = (before.abs() > rounding) & (after.abs() > rounding)
    scale = torch.where(usable, before, 1) / torch.where(usable, after, 1)
    plain = (weights == 1).all(dim=1)[:, None, None]
    return torch.where(plain, context, (weighted * scale).to(context.dtype))


def _weighted_text(prompt: str) -> Iterator[tuple[str | None, float]]:
    """Yield each run of text between syntax with its weight; None for a BREAK."""
    tokens = list(_SYNTAX.finditer(prompt))
    numbers = _bracket_numbers(tokens)
    # Square brackets may overlap round ones, so the state is not a stack of brackets but a count of factors 1.1 and a
    # stack of numbers, which only round ones have. The count also makes the weight of "[(x)]" exactly 1.
    steps, factors = 0, [1.0]
    for i, token in enumerate(tokens):
        kind, number = token.lastgroup, numbers.get(i)
        if i not in numbers:
            text = token["escaped"] if kind == "escaped" else token[0]
            yield None if kind == "cut" else text, factors[-1] * _STEP ** min(steps, _MAX_STEPS)
        elif number is None:
            steps += 1 if token[0] in "(]" else -1
        elif kind == "open":
            factors.append(factors[-1] * number)
        else:
            factors.pop()


def _bracket_numbers(tokens: list[re.Match[str]]) -> dict[int, float | None]:
    """Map each bracket to its number, or None; unmatched closing brackets are left out."""
    numbers: dict[int, float | None] = {}
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for i, token in enumerate(tokens):
        if token.lastgroup == "open":
            numbers[i] = None
            opened[token[0]].append(i)
        elif token.lastgroup == "close":
            openings = opened["[" if token[0] == "]" else "("]
            if openings:
                numbers[i] = float(token["number"]) if token["number"] else None
                numbers[openings.pop()] = numbers[i]
    return numbers


def _merge(runs_of_text: list[tuple[str, float]]) -> list[Piece]:
    runs = groupby(runs_of_text, key=itemgetter(1))
    pieces = [Piece("".join(text for text, _ in run), weight) for weight, run in runs]
    for text, weight in pieces:
        if not abs(weight) <= MAX_WEIGHT:  # also refuses NaN
            shown = text if len(text) <= 40 else f"{text[:37]}..."
            raise ValueError(
                f"{shown!r} has weight {weight:g} in its prompt; use one from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g},"
                r" and write brackets that are text as \( and \)"
            )
    return pieces


def _chunks(tokenizer: Tokenizer, prompt: str, embeddings: EmbeddingTable | None = None) -> list[_Chunk]:
    """Split a prompt into at least one chunk. Two BREAKs in a row make an empty chunk; one at the end makes none."""
    room, comma = tokenizer.config.context_length - 2, tokenizer.token_ids(",")[-1]
    table = embeddings or EmbeddingTable([], tokenizer)
    chunks: list[_Chunk] = []
    for section in parse_weights(prompt):
        units = [
            (unit.ids, piece.weight) for piece in section for unit in table.units(tokenizer, piece.text, original=True)
        ]
        chunks += _split(units, room, comma)
    if len(chunks) > MAX_CHUNKS:
        raise ValueError(f"a prompt takes {len(chunks)} chunks of {room} tokens; use {MAX_CHUNKS} at most")
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def _split(units: Sequence[tuple[tuple[int, ...], float]], room: int, comma: int) -> Iterator[_Chunk]:
    """Yield at least one chunk of at most `room` tokens, without splitting a unit.

    If a chunk is full, a phrase that goes on moves to the next one. (Unlike in A1111, its embeddings move with it:
    modules/sd_hijack_clip.py, tokenize_line, leaves their vectors behind.)
    """
    chunk: _Chunk = []
    nearest = 0  # after the last comma; 0: there is none
    for ids, weight in units:
        is_comma = ids == (comma,)
        if len(chunk) == room and not is_comma and nearest > max(room - COMMA_REACH, 0):
            yield chunk[:nearest]
            chunk, nearest = chunk[nearest:], 0
        if len(chunk) + len(ids) > room:
            yield chunk
            chunk, nearest = [], 0
        if is_comma:
            nearest = len(chunk) + 1
        chunk += [(i, weight) for i in ids]
    yield chunk


def _tensors(tokenizer: Tokenizer, chunks: list[_Chunk]) -> WeightedPrompt:
    ids = tokenizer([""] * len(chunks))  # K, L: BOS, EOS and padding
    weights = torch.ones(ids.shape)  # K, L
    for k, chunk in enumerate(chunks):
        end = len(chunk) + 1
        ids[k, 1 : end + 1] = torch.tensor([*(i for i, _ in chunk), tokenizer.eos_id])
        weights[k, 1:end] = torch.tensor([weight for _, weight in chunk])
    return WeightedPrompt(ids, weights)
