"""Parameters of a drawing, declared once: command line, prompt files, metadata and checks are derived from them."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any

_KEY = "parameter"


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, by default inclusive."""

    low: float
    high: float = math.inf  # infinity itself is never in the range
    low_excluded: bool = False
    high_excluded: bool = False
    words: str = ""  # the range in an error message; "": "low to high"

    def __contains__(self, value: float) -> bool:
        above = self.low < value if self.low_excluded else self.low <= value
        return above and (value < self.high if self.high_excluded or self.high == math.inf else value <= self.high)

    def check(self, name: str, value: float) -> None:
        """Raise ValueError, naming the value, if it is out of range; NaN always is."""
        if value not in self:
            raise ValueError(f"{name} is {value}, expected {self.words or f'{self.low} to {self.high}'}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """Properties of a field in addition to its name, type and default."""

    help: str  # with placeholders {default} and {names}
    kind: Callable[[str], Any] = str  # converts a word of the command line or a prompt file to the value
    flags: tuple[str, ...] = ()  # on the command line; the main one first
    metavar: str | tuple[str, ...] | None = None  # a tuple: as many values
    group: str = ""  # heading of the command line's help
    choices: tuple[str, ...] = ()  # all allowed values
    names: str | Callable[[], str] = ""  # some of the allowed values, for the help
    within: Range | None = None
    in_line: tuple[str, ...] = ()  # options in a line of a prompt file
    a1111: str = ""  # its name in AUTOMATIC1111's text, if there is one

    def help_for(self, default: object) -> str:
        """Return the help with the default and the names filled in."""
        names = self.names() if callable(self.names) else self.names
        return self.help.format(default=default, names=names or ", ".join(self.choices))


def keys_of(table: str, file: str) -> Callable[[], str]:
    """Return a function that lists a table's keys, each with its entry's `note`, if it has one, from the source of a
    file of ldm/: an import would load torch."""
    return partial(_keys_in, table, Path(__file__).parents[1] / file)


def _keys_in(table: str, file: Path) -> str:
    nodes = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.AnnAssign)]
    (found,) = [node.value for node in nodes if ast.unparse(node.target) == table]
    assert isinstance(found, ast.Dict)
    return ", ".join(
        ast.literal_eval(key) + _note_in(value) for key, value in zip(found.keys, found.values, strict=True) if key
    )


def _note_in(entry: ast.expr) -> str:
    words = {word.arg: word.value for word in entry.keywords} if isinstance(entry, ast.Call) else {}
    return f" ({ast.literal_eval(words['note'])})" if "note" in words else ""


def parameter(default: Any, help: str, **about: Any) -> Any:
    """Create a dataclass field with this default, and a Parameter as its metadata."""
    return field(default=default, metadata={_KEY: Parameter(help=help, **about)})


def parameters(of: type) -> dict[str, Parameter]:
    """List the parameters among a dataclass's fields, by name, in order."""
    return {entry.name: entry.metadata[_KEY] for entry in fields(of) if _KEY in entry.metadata}


def check_number(words: str, value: object, kind: object) -> None:
    """Raise TypeError unless the value is a number, of any library, and whole if kind is int."""
    wanted, expected = (Integral, "a whole number") if kind is int else (Real, "a number")
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise TypeError(f"{words} is {value!r}, expected {expected}")


def check_is_text(words: str, value: object) -> None:
    """Raise TypeError unless the value is text."""
    if not isinstance(value, str):
        raise TypeError(f"the {words} is a {type(value).__name__}, expected text")


def check_ranges(instance: object) -> None:
    """Raise ValueError, naming the value, if a parameter is out of its range or not one of its choices, and TypeError
    if it is no number and must be one."""
    for name, about in parameters(type(instance)).items():
        value, words = getattr(instance, name), name.replace("_", " ")
        if about.within is not None and value is not None:
            check_number(words, value, about.kind)
        if about.within is not None and value is not None:
            about.within.check(words, value)
        if about.choices and value not in about.choices:
            raise ValueError(f"no {words} {value!r}, expected {' or '.join(about.choices)}")
