"""Read untrusted JSON files: bounded in size, and either an object or an error that names the file."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from ldm.files.atomic import write_atomically

MAX_BYTES = 2**24  # an index of a million tensors would be larger


def read_json(
    path: Path, *, most: int = MAX_BYTES, missing: str = "is missing: give the folder of a complete model"
) -> dict[str, Any]:
    """Read the JSON object in a file.

    most: bytes. missing: the end of the error message for a missing file. Raises FileNotFoundError if it is missing;
    ValueError, naming the file, if it is not a JSON object of at most `most` bytes.
    """
    return parse_json(read_text(path, most=most, missing=missing, kind="JSON"), source=path)


def read_text(path: Path, *, most: int = MAX_BYTES, missing: str, kind: str = "text") -> str:
    """Read a UTF-8 file, without a byte-order mark. kind: its type in messages. Raises the same errors as read_json."""
    try:
        if path.exists() and not path.is_file():  # a pipe or a device might never end
            raise ValueError(f"{path} is not a plain file, expected {kind}")
        if path.stat().st_size > most:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {kind} of at most {most}")
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} {missing}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give another, or copy it again") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not {kind} in UTF-8 ({error}): save it as UTF-8, or copy it again") from error


def parse_json(text: str, *, source: Path | str) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError, naming the source."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not JSON ({error}): copy it again") from error
    if type(content) is not dict:
        raise ValueError(f"{source} must hold a JSON object, not a {type(content).__name__}: copy it again")
    return content


def json_lines(text: str) -> list[dict[str, Any]]:
    """Parse the JSON objects in complete lines; a writer that was interrupted may have left an incomplete one."""
    found: list[Any] = []
    for line in text.splitlines():
        with suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict)]


def write_json(content: Any, path: Path, *, indent: int | None = 2, ensure_ascii: bool = True) -> None:
    """Write a JSON file atomically."""
    text = json.dumps(content, indent=indent, ensure_ascii=ensure_ascii) + "\n"
    write_atomically(path, text.encode())
