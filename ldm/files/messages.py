"""Format messages: errors on one line, suggestions for unknown names, and lists of mismatches."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

SHOWN = 5  # names shown of a long list
Shape = Sequence[int]


def one_line(error: BaseException | str, most: int | None = None) -> str:
    """Format an error without line breaks, cut to `most` characters; its class name if it has no text."""
    text = " ".join(str(error).split())
    return text[:most] or type(error).__name__


def printable(text: str, most: int | None = None) -> str:
    """Escape control and unprintable characters, such as line ends; cut the text to `most` characters."""
    cut = text if most is None or len(text) <= most else text[:most] + "..."
    if cut.isprintable():
        return cut
    joiner = "\u200d"  # not printable by itself, but part of many emoji
    return "".join(c if c.isprintable() or c == joiner else c.encode("unicode_escape").decode() for c in cut)


def did_you_mean(given: str, known: Iterable[str]) -> str | None:
    """Find the known name most similar to the given one; None if none is similar."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return near[0] if near else None


def unknown_name(what: str, given: str, names: Mapping[str, str]) -> ValueError:
    """Build the error for an unknown name; it suggests the nearest name and lists all.

    names: maps each spelling, in lower case, to the name itself.
    """
    near = did_you_mean(given.lower(), names)
    hint = f", did you mean {names[near]}?" if near else ":"
    return ValueError(f"no {what} {given!r}{hint} There are {', '.join(dict.fromkeys(names.values()))}")


def some(names: Iterable[str]) -> str:
    """List the first five names, sorted, and "..." for the rest."""
    ordered = sorted(names)
    return ", ".join(ordered[:SHOWN]) + (", ..." if len(ordered) > SHOWN else "")


def describe_misfit(wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> str:
    """Describe how the tensors in a file differ from a network's, by name and shape; "" if they match.

    For example "2 missing (a, b); 1 of another shape (c (3, 4) for (4, 4))".
    """
    differing = [name for name in wanted.keys() & found.keys() if tuple(wanted[name]) != tuple(found[name])]
    faults = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": {f"{name} {tuple(found[name])} for {tuple(wanted[name])}" for name in differing},
    }
    return "; ".join(f"{len(names)} {fault} ({some(names)})" for fault, names in faults.items() if names)
