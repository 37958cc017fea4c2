"""Convert YAML to frozen dataclasses and back; only this file uses YAML and pydantic.

Each component's config is defined next to its class and validates itself; this file knows none of them.
"""

from __future__ import annotations

import dataclasses
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Field, ValidationError, create_model

from ldm.files.messages import did_you_mean, one_line
from ldm.files.paths import user_path

Config = TypeVar("Config")
BY_KIND: Any = Field(discriminator="kind")  # for unions of dataclasses: Annotated[A | B, BY_KIND]


def load_config(kind: type[Config], path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides and validate the result.

    Raises ValueError, one line naming the key, for a missing file, an unknown key or a wrong value.
    """
    return parse(kind, load_tree(path, overrides), source=str(path))


def load_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a YAML file, `section.key=value` words applied. Raises ValueError as load_config does."""
    try:
        tree = yaml.safe_load(user_path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"config {path} cannot be read ({error.strerror}): see the files in configs/") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not YAML: {one_line(str(error))}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"config {path} holds no sections: see those in configs/")
    for override in overrides:
        _apply(tree, override)
    return tree


def parse(kind: type[Config], tree: Any, *, source: str) -> Config:
    """Validate a tree of plain values against the dataclass `kind`. Raises ValueError as load_config does."""
    # The wrapper's extra="forbid" makes pydantic refuse unknown keys in the plain dataclasses below it.
    wrapper = create_model("Root", __config__=ConfigDict(extra="forbid"), root=(kind, ...))
    try:
        return wrapper.model_validate({"root": tree}).root  # pyright: ignore[reportAttributeAccessIssue]
    except ValidationError as error:
        raise ValueError(f"{source}: {_first_error(error, kind, tree)}") from error


def read_tree(text: str) -> dict[str, Any]:
    """Read the plain values from the text of `dump`; empty for anything else."""
    try:
        tree = yaml.load(text, Loader=_WithoutAliases)
    except (yaml.YAMLError, LookupError, AttributeError, TypeError, RecursionError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


class _WithoutAliases(yaml.SafeLoader):
    """dump writes no aliases, and a few of them may stand for more values than any memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def dump(config: Any) -> str:
    """Write the resolved configuration as YAML; parsing it gives an equal one."""
    return to_yaml(_plain(dataclasses.asdict(config)))


def to_yaml(tree: dict[str, Any]) -> str:
    """Write plain values as YAML, in their order."""
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _apply(tree: Any, override: str) -> None:
    path, equals, text = override.partition("=")
    *sections, key = path.split(".")
    if not equals or not key:
        raise ValueError(f"{override!r} is not an override: write section.key=value")
    for section in sections:
        tree = tree.setdefault(section, {}) if isinstance(tree, dict) else None
    if not isinstance(tree, dict):
        raise ValueError(f"{override!r}: {'.'.join(sections)} is a value, not a section")
    try:
        tree[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{override!r}: the value is not YAML") from error


def _first_error(error: ValidationError, kind: type, tree: Any) -> str:
    first = error.errors()[0]
    place = _keys(first["loc"][1:], tree)
    where = ".".join(place)
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown key {where}; {_known_instead(kind, place)}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] in ("missing", "value_error") else f" (given {reprlib.repr(first['input'])})"
    return (f"{where}: {message}{given}" if where else message) + _nearest(first)


def _keys(place: Sequence[str | int], tree: Any) -> list[str]:
    """Return the keys of a place in the tree. pydantic adds the kind of a section that has one, which is no key."""
    keys: list[str] = []
    for part in place:
        if isinstance(tree, dict) and part not in tree and tree.get("kind") == part:
            continue
        keys.append(str(part))
        tree = tree.get(part) if isinstance(tree, dict) else None
    return keys


def _nearest(error: Any) -> str:
    """Suggest an expected name if the given value, or its `kind`, resembles one."""
    context = error.get("ctx", {})
    expected = context.get("expected") or context.get("expected_tags", "")
    given = reprlib.repr(context.get("tag", error["input"])).strip("'")  # shortened, for any value
    near = did_you_mean(given, re.findall(r"'([^']*)'", expected))
    return f"; did you mean {near}?" if near else ""


def _known_instead(kind: type, place: Sequence[str]) -> str:
    """Suggest a key in place of an unknown one: of its own section or, for one without a section, of any."""
    *sections, key = place
    kinds, elsewhere = _dataclasses(kind), list[str]()
    for section in sections:  # numbers of a list's items, and the kinds of a union, are no sections
        inner = [get_type_hints(one)[section] for one in kinds if section in _keys_of([one])]
        kinds = [found for hint in inner for found in _dataclasses(hint)] or kinds
    known = _keys_of(kinds)
    if near := did_you_mean(key, known):
        return f"did you mean {near}?"
    for section in () if sections else sorted(known):
        hints = [get_type_hints(one)[section] for one in kinds if section in _keys_of([one])]
        if key in _keys_of([found for hint in hints for found in _dataclasses(hint)]):
            elsewhere.append(f"{section}.{key}")
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"known keys{' of ' + '.'.join(sections) if sections else ''}: {', '.join(sorted(known))}"


def _keys_of(kinds: Sequence[Any]) -> set[str]:
    return {entry.name for kind in kinds for entry in dataclasses.fields(kind)}


def _dataclasses(hint: Any) -> list[Any]:
    """List the dataclasses of a type: itself, or those of a union or a collection."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for inner in get_args(hint) for found in _dataclasses(inner)]
