"""What errors and logs have in common: one line, the nearest name, and a list of what does not fit."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

SHOWN = 5  # of a long list of names
Shape = Sequence[int]


def one_line(error: BaseException | str, most: int | None = None) -> str:
    """An error's text without line breaks, at most so many characters; its class where it has no text."""
    text = " ".join(str(error).split())
    return text[:most] or type(error).__name__


def printable(text: str, most: int | None = None) -> str:
    """Escape what a terminal would obey or could not show, such as line ends; cut what is longer than `most`."""
    cut = text if most is None or len(text) <= most else text[:most] + "..."
    if cut.isprintable():
        return cut
    joiner = "\u200d"  # not printable by itself, but part of many emoji
    return "".join(c if c.isprintable() or c == joiner else c.encode("unicode_escape").decode() for c in cut)


def did_you_mean(given: str, known: Iterable[str]) -> str | None:
    """The known name that resembles the given one most; None if none does."""
    near = difflib.get_close_matches(given, list(known), n=1)
    return near[0] if near else None


def unknown_name(what: str, given: str, names: Mapping[str, str]) -> ValueError:
    """The error for an unknown name: it suggests the nearest and lists all.

    names: each way of writing a name, in small letters, and the name itself.
    """
    near = did_you_mean(given.lower(), names)
    hint = f", did you mean {names[near]}?" if near else ":"
    return ValueError(f"no {what} {given!r}{hint} There are {', '.join(dict.fromkeys(names.values()))}")


def some(names: Iterable[str]) -> str:
    """The first five names, in order, and dots for the others."""
    ordered = sorted(names)
    return ", ".join(ordered[:SHOWN]) + (", ..." if len(ordered) > SHOWN else "")


def describe_misfit(wanted: Mapping[str, Shape], found: Mapping[str, Shape]) -> str:
    """How the tensors that a file holds differ from those that a network needs, by name and shape; "" if they do not.

    For example "2 missing (a, b); 1 of another shape (c (3, 4) for (4, 4))".
    """
    shapes = {
        f"{name} {tuple(found[name])} for {tuple(wanted[name])}"
        for name in wanted.keys() & found.keys()
        if tuple(wanted[name]) != tuple(found[name])
    }
    faults = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": shapes,
    }
    return "; ".join(f"{len(names)} {fault} ({some(names)})" for fault, names in faults.items() if names)
