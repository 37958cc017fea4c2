"""The schema of a config.json: a frozen dataclass that states its keys once, for reading and for writing.

A field is a whole number with a limit (`whole`), a property that all these networks have (`fixed`), or any value, which
its reader checks. A field with a default may be absent, or null. One whose name begins with _ is only written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from ldm.interop.network_files import check_whole_numbers


def whole(most: int, *, default: Any = MISSING) -> Any:
    """Declare a whole number from 1 to `most`, or a list of them: the network is built before its weights are read."""
    return field(default=default, metadata={"most": most})


def fixed(value: Any) -> Any:
    """Declare a key with which the weights would load but compute something else if it had another value."""
    return field(default=value, init=False)


@dataclass(frozen=True, kw_only=True)
class ConfigJson:
    """The base of all schemas. Keys are written in the order of the fields."""

    UNUSED: ClassVar[Mapping[str, Any]] = {}  # further fixed keys, which are not written
    IGNORED: ClassVar[tuple[str, ...]] = ()  # further keys, which never change the result, and are not written

    def to_json(self) -> dict[str, Any]:
        return {key.name: getattr(self, key.name) for key in fields(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], *, source: Path) -> Self:
        """Read the keys. Raises ValueError for a missing key, a number out of range, or a value that may change the
        computation: of a fixed key, or of an unknown one, unless that is null, false, 0 or empty, as an unused option
        is."""
        keys = {key.name: key for key in fields(cls) if not key.name.startswith("_")}
        only = {name: key.default for name, key in keys.items() if not key.init} | dict(cls.UNUSED)
        for name, value in content.items():
            if name in only and value not in (None, only[name]):
                problem = f"{name} {value!r}, expected {only[name]!r}"
            elif value and not name.startswith("_") and name not in {*only, *keys, *cls.IGNORED}:
                problem = f"the unknown key {name} {str(value)[:60]}"
            else:
                continue
            raise ValueError(f"{source} has {problem}: this network is not supported")
        limits = {name: key.metadata["most"] for name, key in keys.items() if "most" in key.metadata}
        check_whole_numbers(content, limits, source=source)
        required = {name for name, key in keys.items() if key.default is MISSING}
        if lacking := sorted(required - content.keys()):
            raise ValueError(f"{source} lacks the key {lacking[0]!r}: copy it again")
        read = [name for name in content if name in keys and name not in only]
        return cls(**{name: content[name] for name in read if name in required or content[name] is not None})
