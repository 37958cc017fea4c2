"""Text files of requests.

A prompt file has one prompt per line; blank lines and lines starting with # are skipped. Options at the end of a line
replace the command line's for that line, in kohya's short form or in A1111's long one:

    a red apple
    a red apple --n leaves, stalk --w 96 --h 64 --s 20 --d 7 --l 3.5
    --prompt "a red apple" --negative_prompt "leaves, stalk" --width 96 --steps 20 --seed 7 --cfg_scale 3.5

A value may be quoted, and must be if it contains words that start with two hyphens.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.files.strict_json import read_text
from ldm.inference.parameter import parameters
from ldm.inference.request import DrawRequest

MAX_FILE_BYTES, KIND = 16 * 2**20, "a text file with one prompt per line"
# Option -> (field of DrawRequest, kind of its value).
OPTIONS = {word: (name, about.kind) for name, about in parameters(DrawRequest).items() for word in about.in_line}
OPTION = re.compile(r"(?<!\S)--([A-Za-z][\w-]*)(?!\S)")
QUOTED = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)')(?=\s+--[A-Za-z]|\s*$)""")


def read_prompts(path: Path, defaults: DrawRequest) -> list[DrawRequest]:
    """Read the requests of a prompt file. Raises ValueError or OSError, naming file and line."""
    lines = read_text(path, most=MAX_FILE_BYTES, missing=f"is missing: give {KIND}", kind=KIND).split("\n")
    requests = [
        parse_line(line.strip(), defaults, place=f"{path}, line {number}: ")
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.strip().startswith("#")
    ]
    if not requests:
        raise ValueError(f"{path} contains no prompt: write one per line")
    return requests


def parse_line(line: str, defaults: DrawRequest, *, place: str) -> DrawRequest:
    """Parse one line. Raises ValueError, starting with place."""
    changes: dict[str, Any] = {}
    for option, text in split_line(line):
        name = option.lower().replace("-", "_")
        if name not in OPTIONS:
            known = ", ".join(f"--{known}" for known in OPTIONS)
            raise ValueError(f"{place}unknown option --{option}, expected one of {known}")
        field, kind = OPTIONS[name]
        if field in changes:
            raise ValueError(f"{place}{field} is given twice ({changes[field]!r} and {text!r}): remove one")
        try:
            changes[field] = kind(text)
        except ValueError:
            number = "a whole number" if kind is int else "a number"
            raise ValueError(f"{place}--{option} is {text!r}, expected {number}") from None
    if "prompt" not in changes:
        raise ValueError(f'{place}there are options but no prompt: write it first, or --prompt "" for an empty one')
    try:
        return replace(defaults, place=place, **changes)
    except ValueError as error:
        raise ValueError(f"{place}{error}") from None


def split_line(line: str) -> list[tuple[str, str]]:
    """Split a line into pairs of an option and its text, in order; the text before the first option is the prompt."""
    option = OPTION.search(line)
    prompt = line[: option.start() if option else None].strip()
    fields = [("prompt", prompt)] if prompt else []
    while option:
        quoted = QUOTED.match(line, option.end())
        following = OPTION.search(line, quoted.end() if quoted else option.end())
        if quoted:
            double, single = quoted.groups()
            text = single if double is None else re.sub(r"\\(.)", r"\1", double)
        else:
            text = line[option.end() : following.start() if following else None].strip()
        fields.append((option[1], text))
        option = following
    return fields
