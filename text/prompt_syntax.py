"""Syntax that users of other programs type in prompts: the tags of LoRAs, and what is drawn as words here.

`<lora:NAME:0.8>` is AUTOMATIC1111's web UI's ("A1111"): modules/extra_networks.py and its LoRA extension, version 1.9.
"""

import math
import re
from collections.abc import Callable, Collection
from typing import NamedTuple

MAX_STRENGTH = 100.0  # of a LoRA, of either sign

_TAG = re.compile(r"<(?P<kind>\w+):(?P<words>[^>]+)>")
_LORA_KINDS = ("lora", "lyco")  # LyCORIS had a tag of its own, until A1111 read both alike
_OTHER_KINDS = ("hypernet",)
# A number after a colon belongs to syntax, unless it is a time or a ratio, as in "(at 10:30)".
_NUMBER = r":\s*[+-]?(?:\d+\.?\d*|\.\d+)\s*"
# What A1111 reads in a prompt that is drawn without weighting; single brackets are common in plain text.
_WEIGHTING = {
    "(words:1.3)": re.compile(rf"\([^()]*[^()\d\s]\s*{_NUMBER}\)"),
    "((words))": re.compile(r"\(\([^()]*\)\)"),
    "[[words]]": re.compile(r"\[\[[^\[\]]*\]\]"),
    "[a:b:0.5]": re.compile(rf"\[(?:[^\[\]]*[^\[\]\d\s])?\s*{_NUMBER}\]"),
    "[a|b]": re.compile(r"\[[^\[\]|]*\|[^\[\]]*\]"),
    "BREAK": re.compile(r"\bBREAK\b(?=.*[a-z])|[a-z].*\bBREAK\b", re.DOTALL),
    "AND": re.compile(r"[a-z,)\]]\s+AND\s+[a-z(\[]"),
}
# Of A1111's extensions and other programs; no option reads it.
_UNKNOWN = {
    "{a|b}": re.compile(r"\{[^{}|]*\|[^{}]*\}"),
    "{{words}}": re.compile(r"\{\{[^{}]*\}\}"),
    "__wildcard__": re.compile(r"(?<!\w)__[\w/-]*\w__(?![\w.(])"),
}
_EMBEDDING = re.compile(r"(?<!\w)embedding:([^\s,()\[\]:<>]+)", re.IGNORECASE)


class LoraTag(NamedTuple):
    """A LoRA that a prompt asks for, and its strengths in the text encoder and in the denoiser."""

    name: str
    text_strength: float
    denoiser_strength: float
    written: str


class Untagged(NamedTuple):
    """A prompt without its tags."""

    text: str
    loras: list[LoraTag]
    others: list[str]  # tags of other kinds, as they are written


def is_tag(match: re.Match[str], *, all_kinds: bool) -> bool:
    return all_kinds or match["kind"] in (*_LORA_KINDS, *_OTHER_KINDS)


def without_tags(prompt: str, *, all_kinds: bool, kept: Callable[[str], bool] = lambda tag: False) -> Untagged:
    """Remove the tags from a prompt, as A1111 does: nothing remains of them.

    all_kinds: include kinds that A1111 does not know, `<name:...>`. kept: whether a tag is text, such as an embedding's
    name. Raises ValueError for a LoRA whose strength is not a number, or out of range.
    """
    loras: list[LoraTag] = []
    others: list[str] = []

    def removed(match: re.Match[str]) -> str:
        if kept(match[0]) or not is_tag(match, all_kinds=all_kinds):
            return match[0]
        if match["kind"] in _LORA_KINDS:
            loras.append(_lora(match))
        else:
            others.append(match[0])
        return ""

    return Untagged(_TAG.sub(removed, prompt), loras, others)


def unread(prompt: str, *, weighting: str, tags: bool, embeddings: Collection[str] = ()) -> dict[str, list[str]]:
    """List what would be drawn as words though it looks like syntax: by the remedy, examples as they are written.

    The remedies are "weighting", "lora", "embedding" and "", for which there is none. tags: whether tags are removed.
    embeddings: the names that are given, in lower case.
    """
    found: dict[str, list[str]] = {}
    if weighting == "none":
        found["weighting"] = [match[0] for kind in _WEIGHTING.values() if (match := kind.search(prompt))]
    if not tags:
        found["lora"] = [match[0] for match in _TAG.finditer(prompt) if is_tag(match, all_kinds=False)]
    found["embedding"] = [match[0] for match in _EMBEDDING.finditer(prompt) if match[0].lower() not in embeddings]
    found[""] = [match[0] for kind in _UNKNOWN.values() if (match := kind.search(prompt))]
    return {remedy: examples for remedy, examples in found.items() if examples}


def _lora(match: re.Match[str]) -> LoraTag:
    """Read name:0.8, name:0.8:0.6 (text encoder, denoiser) or name:te=0.8:unet=0.6."""
    words = match["words"].split(":")
    named = dict(word.split("=", 1) for word in words[1:] if "=" in word)
    name, *numbers = (word for i, word in enumerate(words) if i == 0 or "=" not in word)
    text = named.get("te", numbers[0] if numbers else "1")
    denoiser = named.get("unet", numbers[1] if len(numbers) > 1 else text)
    return LoraTag(name.strip(), _strength(text, match[0]), _strength(denoiser, match[0]), match[0])


def _strength(word: str, tag: str) -> float:
    try:
        strength = float(word)
    except ValueError:
        strength = math.nan
    if not abs(strength) <= MAX_STRENGTH:
        raise ValueError(
            f"the strength in {tag} is {word!r}, expected a number from -100 to 100, as in <lora:name:0.8>"
        )
    return strength
