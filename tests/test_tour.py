"""docs/tour.md: what it names exists, what it counts is so, and its floors are those of the structure's test."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "tour.md").read_text()
WORDS = set(re.findall(r"`([^`\s]+)`", PAGE))
PATHS = sorted(word for word in WORDS if "/" in word or word.endswith(".py"))
NAMES = sorted(word for word in WORDS - set(PATHS) if re.fullmatch(r"(ldm|vae|text|data|txt2img)(\.\w+)+", word))
STOPS = re.findall(r"^\| (\d+) \| `([^`]+)` \| (\d+) \| (.+) \|$", PAGE, flags=re.MULTILINE)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def lines_of(name: str) -> int:
    """Of a file, or of what a dotted name is defined as. Raises AssertionError where there is no such thing."""
    if name.endswith(".py"):
        return len((ROOT / name).read_text().splitlines())
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        base = ROOT.joinpath(*parts[:end])
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return lines_within(tree(path), parts[end:])
    raise AssertionError(f"{name}: no such module")


def lines_within(node: ast.AST, parts: list[str]) -> int:
    for part in parts:
        found = [
            child
            for child in ast.iter_child_nodes(node)
            if getattr(child, "name", None) == part
            or isinstance(child, ast.AnnAssign)
            and ast.unparse(child.target) == part
        ]
        assert len(found) == 1, f"no {part}"
        (node,) = found
    start, end = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0)
    return (end or 0) - start + 1


def test_the_page_names_much():
    assert len(PATHS) > 20 and len(NAMES) > 25 and len(STOPS) == 20


@pytest.mark.parametrize("path", PATHS)
def test_every_file_exists(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", NAMES)
def test_every_name_exists(name):
    assert lines_of(name) > 0


@pytest.mark.parametrize(("name", "stated"), [(name, int(lines)) for _, name, lines, _ in STOPS])
def test_every_count_is_right_to_15_percent(name, stated):
    assert lines_of(name) == pytest.approx(stated, rel=0.15, abs=1)


def test_the_stops_are_numbered_and_their_sum_is_stated():
    assert [int(number) for number, *_ in STOPS] == list(range(1, len(STOPS) + 1))
    (stated,) = re.findall(r"about ([\d,]+) lines", PAGE)
    assert sum(lines_of(name) for _, name, *_ in STOPS) == pytest.approx(int(stated.replace(",", "")), rel=0.1)


def test_its_floors_are_the_folders_that_there_are():
    floors: dict[int, set[str]] = {}
    for number, folders in re.findall(r"^\| (\d) \| (`.+?`) \| [a-zA-Z]", PAGE, flags=re.MULTILINE):
        floors.setdefault(int(number), set()).update(re.findall(r"`([^`]+)`", folders))
    structure = tree(ROOT / "tests" / "test_structure.py")
    (table,) = [
        ast.literal_eval(node.value)
        for node in structure.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    ]
    shown = {number: {place.removesuffix(".py").replace("/", ".") for place in own} for number, own in floors.items()}
    assert shown == {number: set(own) - {"ldm", "latent_foundry"} for number, own in enumerate(table, 1)}


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\(([\w./-]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists()
