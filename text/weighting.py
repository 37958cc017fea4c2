"""Prompt weighting and long prompts as in AUTOMATIC1111's web UI ("A1111"), its "original" emphasis.

`(x)` times 1.1, `[x]` divided by 1.1, `(x:1.3)` times 1.3, nested ones multiply; a backslash makes the bracket or
backslash after it text, and `BREAK` starts a new chunk. Prompt editing, `[a:b:0.5]` and `[a|b]`, is not part of it:
these are weighted text. Shapes: B prompts, K chunks of a prompt, L context length, D width.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from text.encoder import TextCondition, TextEncoder
from text.tokenizer import Tokenizer

MAX_WEIGHT = 100.0  # of either sign
MAX_CHUNKS = 64  # of a prompt
COMMA_REACH = 20  # tokens that a comma may lie before the end of its chunk to take what follows to the next

_STEP = 1.1  # what a pair of brackets without a number multiplies or divides by
_MAX_STEPS = 7000  # 1.1**7000 is 1e289, which MAX_WEIGHT refuses; far above it Python's power raises

# Each repetition stops at the first character that it cannot take, so that the search is linear in the prompt.
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

_Chunk = list[tuple[int, float]]  # token ids with their weights, without BOS, EOS and padding


class Piece(NamedTuple):
    """A stretch of text without syntax, and its weight."""

    text: str
    weight: float


class WeightedPrompt(NamedTuple):
    """Chunks of token ids, each BOS, tokens, EOS, padding; the weight of what is not text is 1."""

    ids: Tensor  # K, L: int64
    weights: Tensor  # K, L: float32


def parse_weights(prompt: str) -> list[list[Piece]]:
    """The pieces of each section, sections being what BREAK separates: at least one, perhaps without pieces.

    BREAK counts in upper case and as a word of its own. As in A1111, a bracket that
    is never closed reaches to the end of the prompt, a closing one without an opening one is text, round and
    square ones may overlap, a number is read before `)` only, and a backslash that escapes nothing is dropped.
    Unlike there, BREAK also works within brackets. Neighbours of equal weight are one piece. Raises ValueError for
    a weight beyond -100 to 100.
    """
    sections: list[list[tuple[str, float]]] = [[]]
    for text, weight in _stretches(prompt):
        if text is None:
            sections.append([])
        elif text:
            sections[-1].append((text, weight))
    return [_merge(section) for section in sections]


def check_weights(prompt: str) -> None:
    """Raises ValueError where `parse_weights` does; needs no tokenizer."""
    parse_weights(prompt)


def chunk_count(tokenizer: Tokenizer, prompt: str) -> int:
    """K, the chunks that a prompt takes, at least 1; prompts of equal K can be encoded together as they are."""
    return len(_chunks(tokenizer, prompt))


def tokenize_weighted(tokenizer: Tokenizer, prompt: str) -> WeightedPrompt:
    """Ids and weights, K x L each; without weights and in one chunk the ids are those of `tokenizer([prompt])`.

    Pieces are tokenized one by one. A chunk has `context_length` - 2 tokens; a phrase that would be cut moves to
    the next chunk if it began, after a comma, within the last 20 tokens. Raises ValueError for a weight beyond
    -100 to 100, for more than 64 chunks and for text that is no Unicode.
    """
    return _tensors(tokenizer, _chunks(tokenizer, prompt))


def encode_weighted(
    encoder: TextEncoder, tokenizer: Tokenizer, prompts: Sequence[str], device: torch.device | str
) -> TextCondition:
    """The emphasized condition: context B x (K L) x D, mask B x (K L), pooled B x D of the first chunks.

    K is that of the longest prompt; the others are filled up with empty chunks, as in A1111, so that their context
    is another than alone: batch prompts of equal `chunk_count` where that matters. `device` is the encoder's.
    Raises TypeError for a bare string; ValueError for no prompts and for what `tokenize_weighted` refuses.
    """
    if isinstance(prompts, str):
        raise TypeError("expected a list of prompts, got one string; write [prompt]")
    if not prompts:
        raise ValueError("there are no prompts to encode; give at least one, which may be empty")
    chunked = [_chunks(tokenizer, prompt) for prompt in prompts]
    count = max(len(chunks) for chunks in chunked)
    filled = [chunk for chunks in chunked for chunk in chunks + [[]] * (count - len(chunks))]
    ids, weights = _tensors(tokenizer, filled)  # B K, L
    context, pooled, mask = encoder(ids.to(device))  # B K, L, D; B K, D; B K, L
    context = emphasize(context, weights.to(device))  # B K, L, D
    batch, width = len(prompts), context.shape[-1]
    return TextCondition(context.reshape(batch, -1, width), pooled[::count], mask.reshape(batch, -1))


def emphasize(context: Tensor, weights: Tensor) -> Tensor:
    """States B x L x D times weights B x L, each row then scaled back to the mean of its L x D values before.

    A row of weights 1 returns unchanged to the bit. Two departures from A1111: it takes the mean over the whole
    batch, by which a picture would depend on its neighbours; and it divides by any mean, where here a row whose
    mean before or after is nothing but rounding keeps its weighted states as they are.
    """
    weighted = context * weights[..., None]  # B, L, D; float32 or wider
    states = context.to(weighted.dtype)
    before = states.mean(dim=(1, 2), keepdim=True)  # B, 1, 1
    after = weighted.mean(dim=(1, 2), keepdim=True)  # B, 1, 1
    rounding = 1e-4 * states.abs().mean(dim=(1, 2), keepdim=True)  # B, 1, 1: more than bfloat16's
    sound = (before.abs() > rounding) & (after.abs() > rounding)
    scale = torch.where(sound, before, 1) / torch.where(sound, after, 1)
    plain = (weights == 1).all(dim=1)[:, None, None]
    return torch.where(plain, context, (weighted * scale).to(context.dtype))


def _stretches(prompt: str) -> Iterator[tuple[str | None, float]]:
    """Text with its weight, as finely as the syntax cuts it; None for a BREAK."""
    tokens = list(_SYNTAX.finditer(prompt))
    numbers = _bracket_numbers(tokens)
    # Square brackets may overlap round ones, so the state is no stack of brackets but a count of 1.1s and a stack
    # of the numbers, which only round ones have. A count also makes "[(x)]" weigh exactly 1.
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
    """The number of every bracket, None for those without; a closing one that closes nothing is not in it."""
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


def _merge(stretches: list[tuple[str, float]]) -> list[Piece]:
    runs = groupby(stretches, key=itemgetter(1))
    pieces = [Piece("".join(text for text, _ in run), weight) for weight, run in runs]
    for text, weight in pieces:
        if not abs(weight) <= MAX_WEIGHT:  # nor is a NaN
            shown = text if len(text) <= 40 else f"{text[:37]}..."
            raise ValueError(
                f"{shown!r} has weight {weight:g} in its prompt; use one from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g},"
                r" and write brackets that are text as \( and \)"
            )
    return pieces


def _chunks(tokenizer: Tokenizer, prompt: str) -> list[_Chunk]:
    """At least one chunk; a BREAK ends its own, so that two in a row leave an empty one, and the last none."""
    room, comma = tokenizer.config.context_length - 2, tokenizer.token_ids(",")[-1]
    chunks: list[_Chunk] = []
    for section in parse_weights(prompt):
        tokens = [(i, piece.weight) for piece in section for i in tokenizer.token_ids(piece.text)]
        start = 0
        while len(tokens) - start > room:
            end = _end([i for i, _ in tokens[start : start + room + 1]], comma) + start
            chunks.append(tokens[start:end])
            start = end
        chunks.append(tokens[start:])
    if len(chunks) > MAX_CHUNKS:
        raise ValueError(f"a prompt takes {len(chunks)} chunks of {room} tokens; use {MAX_CHUNKS} at most")
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def _end(ids: list[int], comma: int) -> int:
    """How many of the ids of a full chunk and one more stay in the chunk: all but a phrase that would be cut."""
    room = len(ids) - 1
    if ids[room] == comma:
        return room
    nearest = range(room - 1, max(room - COMMA_REACH, 0) - 1, -1)
    return next((i + 1 for i in nearest if ids[i] == comma), room)


def _tensors(tokenizer: Tokenizer, chunks: list[_Chunk]) -> WeightedPrompt:
    ids = tokenizer([""] * len(chunks))  # K, L: BOS, EOS and padding
    weights = torch.ones(ids.shape)  # K, L
    for k, chunk in enumerate(chunks):
        end = len(chunk) + 1
        ids[k, 1 : end + 1] = torch.tensor([*(i for i, _ in chunk), tokenizer.eos_id])
        weights[k, 1:end] = torch.tensor([weight for _, weight in chunk])
    return WeightedPrompt(ids, weights)
