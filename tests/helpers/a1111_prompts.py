"""The rules by which AUTOMATIC1111's web UI reads prompts, written again from its behaviour, for tests.

Sources, version 1.9: modules/prompt_parser.py (schedules, the step at which an entry ends), modules/sd_hijack_clip.py
(tokenize_line: chunks, embeddings), modules/extra_networks.py (tags). Nothing here is shared with the product; for
balanced prompts, the schedules are those of its grammar, as compared with lark.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

CHUNK, REACH = 75, 20
Place = int | str  # a token's id, or the name of the embedding that a vector belongs to


def schedules(prompt: str, steps: int) -> list[list[object]]:
    """[[end, text], ...], for prompts whose brackets are balanced, by replacing the innermost groups first."""
    found: list[Callable[[int], str]] = []  # texts at a step, for what is replaced
    ends = {steps}

    def keep(text_at: Callable[[int], str]) -> str:
        found.append(text_at)
        return f"\0{len(found) - 1}\1"

    def filled(text: str, step: int) -> str:
        return re.sub("\0(\\d+)\1", lambda mark: found[int(mark[1])](step), text)

    def square(inner: str) -> str:
        options, parts = inner.split("|"), inner.split(":")
        if len(options) > 1 and len(parts) == 1:
            ends.update(range(1, steps + 1))
            return keep(lambda step: filled(options[(step - 1) % len(options)], step))
        number = parts[-1].strip()
        if len(options) == 1 and len(parts) in (2, 3) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", number):
            when = min(steps, int(float(number) * steps if "." in number else float(number)))
            ends.update([when] if when >= 1 else [])
            before, after = parts[0] if len(parts) == 3 else "", parts[-2]
            return keep(lambda step: filled(before if step <= when else after, step))
        assert len(options) == len(parts) == 1, "only prompts that the grammar covers"
        return keep(lambda step: f"[{filled(inner, step)}]")

    def round_(inner: str) -> str:
        assert inner.count(":") <= 1 and "|" not in inner, "only prompts that the grammar covers"
        return keep(lambda step: f"({filled(inner, step)})")

    text, before = prompt, ""
    while text != before:
        before = text
        text = re.sub(r"\[([^\[\]()]*)\]", lambda m: square(m[1]), text)
        text = re.sub(r"\(([^\[\]()]*)\)", lambda m: round_(m[1]), text)
    return [[end, filled(text, end)] for end in sorted(ends)]


def text_at(schedule: Sequence[Sequence[object]], evaluation: int) -> object:
    """The text of an evaluation of the denoiser, counted from 0: reconstruct_cond_batch.

    Beyond the last step, where A1111 would go back to the first text, it is the last.
    """
    for end, text in schedule:
        assert isinstance(end, int)
        if evaluation <= end:
            return text
    return schedule[-1][1]


def chunks(tokens: Sequence[int], comma: int, names: Mapping[tuple[int, ...], tuple[str, int]]) -> list[list[Place]]:
    """The chunks of a line without weights; names: an embedding's tokens -> its name and its number of vectors.

    Where a phrase moves to the next chunk, its embeddings move too (A1111 leaves their vectors in the last one, which
    is a mistake).
    """
    result: list[list[Place]] = []
    chunk: list[Place] = []
    last_comma, position = -1, 0
    while position < len(tokens):
        if tokens[position] == comma:
            last_comma = len(chunk)
        elif len(chunk) == CHUNK and last_comma != -1 and len(chunk) - last_comma <= REACH:
            result.append(chunk[: last_comma + 1])
            chunk, last_comma = chunk[last_comma + 1 :], -1
        if len(chunk) == CHUNK:
            result.append(chunk)
            chunk, last_comma = [], -1
        fitting = [name for name in names if tuple(tokens[position : position + len(name)]) == name]
        if not fitting:
            chunk.append(tokens[position])
            position += 1
            continue
        found = max(fitting, key=len)
        word, vectors = names[found]
        if len(chunk) + vectors > CHUNK:
            result.append(chunk)
            chunk, last_comma = [], -1
        chunk += [word] * vectors
        position += len(found)
    return [*result, chunk] if chunk or not result else result


def balanced_prompt(random_: random.Random, depth: int = 3) -> str:
    """A prompt that the grammar covers, of words, weights, changes and alternatives within each other."""

    def some(most: int, depth: int) -> str:
        return "".join(one(depth) for _ in range(random_.randint(0, most)))

    def one(depth: int) -> str:
        kind = random_.randrange(9) if depth else 0
        number = random_.choice(["0.5", ".25", "1.0", "0.", "1.5", "2", "0", "7", "-1", "-.5", "+3", " 4", "0.3 "])
        match kind:
            case 5:
                return f"({some(2, depth - 1)}{random_.choice(['', ':1.2', ':0.5'])})"
            case 6:
                return f"[{some(2, depth - 1)}:{number}]"
            case 7:
                return f"[{some(2, depth - 1)}:{some(2, depth - 1)}:{number}]"
            case 8:
                return "[" + "|".join(some(2, depth - 1) for _ in range(random_.randint(2, 4))) + "]"
            case 4:
                return f"[{some(2, depth - 1)}]"
            case _:
                return random_.choice(["a", "red ", " cat", ", ", "é", "\n", "BREAK", "1", "x1.5"])

    return some(5, depth)
