"""docs/mathematics.md: every equation's function and test exist."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "mathematics.md").read_text()
ROWS = re.findall(r"^\| ([\d, ]+) \| `([\w.]+)` \| `([\w./]+)::(\w+)` \|$", PAGE, flags=re.MULTILINE)


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_the_table_names_every_equation_once():
    shown = numbers(" ".join(re.findall(r"\\tag\{\d+\}|\$\(\d+\)\$", PAGE)))
    listed = [number for row in ROWS for number in numbers(row[0])]
    assert sorted(shown) == sorted(listed) == list(range(1, len(shown) + 1))


@pytest.mark.parametrize(
    ("equation", "function", "file", "test"), ROWS, ids=lambda value: value if "," not in value else ""
)
def test_its_function_and_its_test_exist(equation, function, file, test):
    parts = function.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            found = getattr(found, name)
        break
    assert callable(found)
    names = {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}
    assert test in names
