"""Prompts whose words change over the steps, and prompts of several parts, as in AUTOMATIC1111's web UI ("A1111").

`[a:b:0.5]` is a for half of the steps, then b; `[b:0.5]` adds b there, `[a::0.5]` removes a; a number without a point
counts steps. `[a|b]` alternates. `a AND b :0.7` guides towards both, b with weight 0.7. The rules are those of
modules/prompt_parser.py of A1111 1.9, whose grammar is read here in one pass.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_SYNTAX = re.compile(r"(?P<text>(?:[^\\\[\]():|]|\\.)+)|[\[\]():|]")  # anything else, a lone backslash, ends the parse
_NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*")


class Segment(NamedTuple):
    """A prompt's text up to and including a step."""

    end: int
    text: str


class Part(NamedTuple):
    """One of the prompts that AND joins, and its weight in guidance."""

    text: str
    weight: float


class _Change(NamedTuple):
    before: "_Items"
    after: "_Items"
    number: str


class _Alternatives(NamedTuple):
    options: "list[_Items]"


_Items = list["str | _Change | _Alternatives | _Items"]


class _Frame:
    """An open bracket, and what follows it: parts between separators."""

    def __init__(self, opener: str) -> None:
        self.opener = opener
        self.parts: list[_Items] = [[]]
        self.separators: list[str] = []


def compose(prompt: str) -> list[Part]:
    """Split a prompt at each AND, upper case and a word of its own; a part may end in `:` and its weight, else 1.

    A prompt without AND is one part of weight 1, whatever it ends in. (A1111 reads a weight there too, so that it drops
    the end of "a clock at 10:30".)
    """
    texts = _AND.split(prompt)
    return [_part(text) for text in texts] if len(texts) > 1 else [Part(prompt, 1.0)]


def prompt_schedule(prompt: str, steps: int) -> list[Segment]:
    """Return the texts of a prompt over this many steps, with increasing ends, the last of which is `steps`.

    As in A1111, brackets that are not such syntax stay as they are, for weights; and a prompt with a `|` outside of
    square brackets, or with a backslash at its end, is not edited at all. (Its grammar is ambiguous where brackets are
    not balanced: two that belong to nothing, right after a group, may there make text of the group.)
    """
    items = _parse(prompt)
    if items is None:
        return [Segment(steps, prompt)]
    return [Segment(end, _text_at(items, end, steps)) for end in _ends(items, steps)]


def segment_at(schedule: Sequence[Segment], step: int) -> int:
    """Return the index of the segment for a step, counted from 0: the first that ends at it or later, else the last."""
    return next((i for i, segment in enumerate(schedule) if step <= segment.end), len(schedule) - 1)


def _part(text: str) -> Part:
    before, colon, after = text.rpartition(":")
    number = _WEIGHT.fullmatch(after)
    return Part(before.rstrip(), float(number[1])) if colon and number else Part(text.rstrip(), 1.0)


def _parse(prompt: str) -> _Items | None:
    """Parse a prompt; None if A1111's grammar does not cover it.

    A bracket whose content does not fit is text, and with it all that are still open around it: theirs must hold whole
    groups only.
    """
    root, position = _Frame(""), 0
    frames = [root]
    while position < len(prompt):
        token = _SYNTAX.match(prompt, position)
        if token is None:
            return None
        position, sign = token.end(), token[0]
        if token["text"]:
            frames[-1].parts[-1].append(sign)
        elif sign in "([":
            frames.append(_Frame(sign))
        elif sign in ":|":
            frames[-1].separators.append(sign)
            frames[-1].parts.append([])
        else:
            group = _group(frames[-1], sign)
            if group is None:
                frames = [_flat(frames)]
                frames[0].parts[-1].append(sign)
            else:
                frames.pop()
                frames[-1].parts[-1].append(group)
    root = _flat(frames)
    return None if "|" in root.separators else _joined(root)


def _group(frame: _Frame, closer: str) -> _Items | _Change | _Alternatives | None:
    """Return what a bracket and its content mean; None if they are text."""
    kinds, parts = set(frame.separators), frame.parts
    if (frame.opener, closer) == ("(", ")") and frame.separators in ([], [":"]):
        return ["(", *_joined(frame), ")"]
    if (frame.opener, closer) != ("[", "]"):
        return None
    if not kinds:
        return ["[", *parts[0], "]"]
    if kinds == {"|"}:
        return _Alternatives(parts)
    number = _NUMBER.fullmatch(parts[-1][0]) if len(parts[-1]) == 1 and isinstance(parts[-1][0], str) else None
    if kinds == {":"} and len(parts) <= 3 and number:
        return _Change(parts[0] if len(parts) == 3 else [], parts[-2], number[1])
    return None


def _joined(frame: _Frame) -> _Items:
    """Return a frame's parts with its separators as text."""
    items = list(frame.parts[0])
    for separator, part in zip(frame.separators, frame.parts[1:], strict=True):
        items += [separator, *part]
    return items


def _flat(frames: Sequence[_Frame]) -> _Frame:
    """Return the root with all frames that are still open as text in it."""
    root, *opened = frames
    for frame in opened:
        root.parts[-1] += [frame.opener, *frame.parts[0]]
        root.separators += frame.separators
        root.parts += frame.parts[1:]
    return root


def _step(number: str, steps: int) -> int:
    """Return the last step before a change: with a point, the number is a fraction of the steps, even if above 1."""
    value = float(number) * (steps if "." in number else 1)
    return min(steps, int(value)) if math.isfinite(value) else steps if value > 0 else 0


def _ends(items: _Items, steps: int) -> list[int]:
    found, waiting = {steps}, [items]
    while waiting:
        for item in waiting.pop():
            if isinstance(item, _Change):
                found.add(_step(item.number, steps))
                waiting += [item.before, item.after]
            elif isinstance(item, _Alternatives):
                found.update(range(1, steps + 1))
                waiting += item.options
            elif isinstance(item, list):
                waiting.append(item)
    return sorted(end for end in found if end >= 1)


def _text_at(items: _Items, step: int, steps: int) -> str:
    return "".join(_chosen(items, step, steps))


def _chosen(items: _Items, step: int, steps: int) -> Iterator[str]:
    """Yield the texts at a step, counted from 1, without recursion: brackets may be nested thousands deep."""
    waiting = [iter(items)]
    while waiting:
        item = next(waiting[-1], None)
        if item is None:
            waiting.pop()
        elif isinstance(item, str):
            yield item
        elif isinstance(item, _Change):
            waiting.append(iter(item.before if step <= _step(item.number, steps) else item.after))
        else:
            waiting.append(iter(item if isinstance(item, list) else item.options[(step - 1) % len(item.options)]))
