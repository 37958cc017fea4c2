"""What of a configuration, or of an older card, may leave this machine: no credentials, and no paths."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from data.sources import PIPE, Source
from ldm.interop.hub_cache import PREFIX, SNAPSHOTS
from ldm.interop.network_files import RUN_MODEL

PLACES = ("folder", "cache", "resume")  # keys whose paths mean nothing elsewhere
PATHS = ("shards", "manifest", "vae", "text", "start")  # keys of paths, of which the name is published
WORDS = ("auto", "never")  # of run.resume
ABSOLUTE = re.compile(r"[/~\\]|[A-Za-z]:[/\\]")
IN_TEXT = (
    (re.compile(rf"{PIPE}[^\n`]*"), "a pipe"),
    (re.compile(r"([A-Za-z][A-Za-z0-9+.-]+://)[^\s/@`'\"]*@"), r"\1"),
    (re.compile(r"(https?://[^\s`'\"?]+)\?[^\s`'\",)\]]*"), r"\1"),
)
# Lines of cards up to version 0.2 that repeat the configuration.
OF_CARDS = re.compile(
    r"^(?:\| (?:pictures|began with|started from) \||The error on held-out images \().*$", re.MULTILINE
)


def published(notes: str, publish: dict[str, Any] | None = None) -> str:
    """Return the text of a run's configuration as it may be published; unchanged if nothing in it is private.

    publish: replaces its section of this name. The text of another program is not parsed, only searched.
    """
    from ldm.config import read_tree, to_yaml  # imports pydantic, which drawing does not need

    tree = read_tree(notes)
    if not tree and notes.strip():
        return without_credentials(notes)
    found = _cleaned(tree, "") | ({"publish": publish} if publish else {})
    return notes if found == tree else to_yaml(found)


def _cleaned(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: _cleaned(inner, name) for name, inner in value.items() if not _is_place(name, inner)}
    if isinstance(value, list):
        return [_cleaned(inner, key) for inner in value]
    return public_name(value, is_path=key in PATHS) if isinstance(value, str) else value


def _is_place(key: object, value: Any) -> bool:
    return key in PLACES and isinstance(value, str) and value not in WORDS


def public_name(text: str, *, is_path: bool = True) -> str:
    """Return a location as it may be published: a URL without credentials, "a pipe", the name of a file or model."""
    source = Source(text)
    if not source.is_local:
        return source.shown
    if not is_path and ABSOLUTE.match(text) is None:
        return text
    parts = PurePath(text.replace("\\", "/")).parts
    if SNAPSHOTS in parts and (found := [part for part in parts if part.startswith(PREFIX)]):
        return found[-1].removeprefix(PREFIX).replace("--", "/")
    own = parts[:-1] if len(parts) > 1 and parts[-1] == RUN_MODEL else parts
    return own[-1].strip("/~") if own else ""


def without_credentials(text: str) -> str:
    """Remove the credentials of URLs, and commands of pipes, from a text."""
    for pattern, replacement in IN_TEXT:
        text = pattern.sub(replacement, text)
    return text


def published_card(text: str) -> str:
    """Return an older model card without what its own lines told of locations; other lines are its owner's."""

    def clean(line: re.Match[str]) -> str:
        return re.sub(r"`([^`\n]+)`", lambda quoted: f"`{public_name(quoted[1])}`", without_credentials(line[0]))

    return OF_CARDS.sub(clean, text)
