"""A parameter of a drawing, declared once: command line, prompt files, metadata and checks are made from it."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

_KEY = "parameter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included unless they are excluded here."""

    low: float
    high: float = math.inf  # which itself is never in the range
    low_excluded: bool = False
    high_excluded: bool = False
    words: str = ""  # what an error says was expected; "": "low to high"

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.low_excluded else self.low <= value
        return above and (value < self.high if self.high_excluded or self.high == math.inf else value <= self.high)

    def check(self, name: str, value: float) -> None:
        """Raise ValueError, naming the value, for one out of range; NaN is in none."""
        if value not in self:
            raise ValueError(f"{name} is {value}, expected {self.words or f'{self.low} to {self.high}'}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """All that is known of a field besides its name, its type and its default."""

    help: str  # {default} and {names} stand for what follows
    kind: Callable[[str], Any] = str  # from a word of the command line, or of a prompt file, to the value
    flags: tuple[str, ...] = ()  # on the command line; the first is shown first
    metavar: str | tuple[str, ...] | None = None  # several: so many values
    group: str = ""  # heading of the command line's help
    choices: tuple[str, ...] = ()  # all that it may be
    names: str | Callable[[], str] = ""  # what it may be among others, for the help
    within: Range | None = None
    in_line: tuple[str, ...] = ()  # options in a line of a prompt file
    a1111: str = ""  # its name in AUTOMATIC1111's text, if it has one there

    def help_for(self, default: object) -> str:
        """Fill the default and the names into the help."""
        names = self.names() if callable(self.names) else self.names
        return self.help.format(default=default, names=names or ", ".join(self.choices))


def keys_of(table: str, file: str) -> Callable[[], str]:
    """Return a function that lists a table's keys as a file of ldm/ spells them: --help must not wait for torch."""
    return partial(_keys_in, table, Path(__file__).parents[1] / file)


def _keys_in(table: str, file: Path) -> str:
    nodes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.AnnAssign)]
    (found,) = [node.value for node in nodes if ast.unparse(node.target) == table]
    assert isinstance(found, ast.Dict)
    return ", ".join(ast.literal_eval(key) for key in found.keys if key is not None)


def parameter(default: Any, help: str, **about: Any) -> Any:
    """Make a dataclass's field with this default, and a Parameter as its metadata."""
    return field(default=default, metadata={_KEY: Parameter(help=help, **about)})


def parameters(of: type) -> dict[str, Parameter]:
    """List the parameters among a dataclass's fields, by name, in order."""
    return {entry.name: entry.metadata[_KEY] for entry in fields(of) if _KEY in entry.metadata}


def check_ranges(instance: object) -> None:
    """Raise ValueError, naming the value, for a parameter out of its range, or that is none of its choices."""
    for name, about in parameters(type(instance)).items():
        value, words = getattr(instance, name), name.replace("_", " ")
        if about.within is not None and value is not None:
            about.within.check(words, value)
        if about.choices and value not in about.choices:
            raise ValueError(f"no {words} {value!r}, expected {' or '.join(about.choices)}")
