"""Textual inversion: words that stand for learned vectors in place of tokens' embeddings. Gal et al. 2022, An Image is
Worth One Word (arXiv 2208.01618).

A vector has an id of its own, from the vocabulary's size on, so that ids remain all that a prompt is made of.
Shapes: N vectors of an embedding, D width.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from text.tokenizer import Tokenizer

PREFIX = "embedding:"  # ComfyUI's spelling
SUFFIXES = (".safetensors", ".pt", ".bin")


@dataclass(frozen=True, eq=False)
class Embedding:
    """Vectors N x D, the word that stands for them, and the token that diffusers' file gives them, or ""."""

    name: str
    vectors: Tensor
    token: str = ""
    source: Path = Path()


class Unit(NamedTuple):
    """Ids that stay together: of a token, or of all vectors of an embedding; and where they start in the text."""

    ids: tuple[int, ...]
    start: int


class EmbeddingTable:
    """Embeddings for a tokenizer: finds their names in texts.

    A name is found as in A1111, as the tokens that it consists of, in any case; `embedding:NAME`, as in ComfyUI, and
    the token of diffusers' file are found in the text. Of two names that fit, the longer one counts.
    """

    def __init__(self, embeddings: Sequence[Embedding], tokenizer: Tokenizer) -> None:
        self.embeddings = tuple(embeddings)
        first = tokenizer.vocab_size
        self._spelled: dict[str, tuple[int, ...]] = {}
        self._words: dict[int, list[tuple[list[int], tuple[int, ...]]]] = {}  # by the name's first token
        for one in self.embeddings:
            ids = tuple(range(first, first + len(one.vectors)))
            first += len(one.vectors)
            spelled = [PREFIX + one.name + suffix for suffix in ("", *SUFFIXES)]
            self._spelled |= dict.fromkeys([word.lower() for word in (*spelled, one.token) if word], ids)
            for original in (False, True):
                if name := tokenizer.tokens(one.name, original=original).ids:
                    self._words.setdefault(name[0], []).append((name, ids))
        for names in self._words.values():
            names.sort(key=lambda entry: -len(entry[0]))

    @cached_property
    def vectors(self) -> Tensor:
        """All vectors, in order of their ids: N x D."""
        return torch.cat([one.vectors for one in self.embeddings])

    @property
    def spellings(self) -> frozenset[str]:
        """What is looked for in the text, in lower case: `embedding:NAME` and tokens."""
        return frozenset(self._spelled)

    def units(self, tokenizer: Tokenizer, text: str, *, original: bool = False) -> Iterator[Unit]:
        """Tokenize a text. original: see Tokenizer.tokens."""
        position = 0
        for match in self._pattern.finditer(text) if self._spelled else ():
            yield from self._plain(tokenizer, text[position : match.start()], position, original)
            yield Unit(self._spelled[match[0].lower()], match.start())
            position = match.end()
        yield from self._plain(tokenizer, text[position:], position, original)

    def tokenize(self, tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
        """Tokenize as `tokenizer(texts)` does: B x L, truncated before the EOS."""
        result = tokenizer([""] * len(texts))
        for row, text in zip(result, texts, strict=True):
            ids = [i for unit in self.units(tokenizer, text) for i in unit.ids][: len(row) - 2]
            row[1 : len(ids) + 2] = torch.tensor([*ids, tokenizer.eos_id])
        return result

    def used(self, tokenizer: Tokenizer, texts: Iterable[str]) -> list[Embedding]:
        """List the embeddings that the texts use, in the order in which they were given."""
        ids = {i for text in texts for unit in self.units(tokenizer, text) for i in unit.ids}
        first, used = tokenizer.vocab_size, list[Embedding]()
        for one in self.embeddings:
            used += [one] * (first in ids)
            first += len(one.vectors)
        return used

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._spelled, key=len, reverse=True)
        return re.compile("|".join(map(_as_word, longest_first)), re.IGNORECASE)

    def _plain(self, tokenizer: Tokenizer, text: str, offset: int, original: bool) -> Iterator[Unit]:
        ids, starts = tokenizer.tokens(text, original=original)
        position = 0
        while position < len(ids):
            names = self._words.get(ids[position], ())
            found = next((entry for entry in names if ids[position : position + len(entry[0])] == entry[0]), None)
            yield Unit(found[1] if found else (ids[position],), offset + starts[position])
            position += len(found[0]) if found else 1


def _as_word(spelling: str) -> str:
    """Return a pattern for a spelling that is not part of a longer name; brackets of its own are an end, too."""
    before = r"(?<![\w-])" if spelling[0].isalnum() else ""
    after = r"(?![\w-]|\.\w)" if spelling[-1].isalnum() else ""
    return before + re.escape(spelling) + after
