"""JSON from anywhere is an object, or an error that names the file."""

import json
import os
from pathlib import Path

import pytest

from ldm.files.strict_json import read_json, write_json


def test_what_is_written_is_read(tmp_path: Path):
    content = {"name": "é", "numbers": [1, 2.5, None]}
    for indent, ascii_only in ((None, True), (2, False)):
        write_json(content, tmp_path / "a.json", indent=indent, ensure_ascii=ascii_only)
        assert read_json(tmp_path / "a.json") == content == json.loads((tmp_path / "a.json").read_bytes())
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b'{"a": ', "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "must hold a JSON object, not a list"),
        (b"\xff\xfe", "is not JSON in UTF-8"),
        (b" " * 101, "has 101 bytes, expected JSON of at most 100"),
    ],
)
def test_anything_else_is_an_error_that_names_it(tmp_path: Path, content: bytes, fault: str):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{path} {fault}"):
        read_json(path, most=100 if "101" in fault else 2**24)


def test_what_is_not_there_or_no_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="a.json is gone: bring it back$"):
        read_json(tmp_path / "a.json", missing="is gone: bring it back")
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(ValueError, match="not a plain file"):
            read_json(tmp_path / name)
