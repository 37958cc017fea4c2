"""benchmarks/mutation.py: what it breaks, what it leaves alone, and that what no test looks at survives."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "mutation.py"
spec = spec_from_file_location("mutation", SCRIPT)
assert spec and spec.loader
mutation = module_from_spec(spec)
spec.loader.exec_module(mutation)


def expressions(source: str) -> list[str]:
    return [mutant.id.removeprefix("f.py:").split(": ", 1)[1] for mutant in mutation.mutants_of("f.py", source)]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("y = a * b / c", ["a * b / c"]),
        ("y = -a + 2 * b - 3", ["a", "2 * b", "3"]),
        ("return (a - b) ** 2 / math.sqrt(2 * c)", ["(a - b) ** 2 / math.sqrt(2 * c)", "a", "b"]),
        ("y = a ** (1 / rho)", ["a ** (1 / rho)", "1 / rho"]),
        ("y = math.exp(-h)", ["math.exp(-h)", "h"]),
        ("y = math.log(999)", ["math.log(999)", "999"]),
        ("y = (a / 2).exp().to(x)", ["(a / 2).exp()", "a / 2"]),
        ("y = torch.stack([torch.randn(3) for g in gs]).to(x)", ["torch.randn(3)"]),
        ("y = x.clamp(max=math.log(limit))", ["x", "math.log(limit)", "limit"]),
        ("y = torch.where(chosen, a, 1.0) + b.where(chosen, c)", ["a", "1.0", "b", "c"]),
        ("y = torch.lerp(a, b, 0.5)", ["a", "b", "0.5"]),
        ("y = sum((w * e for w, e in pairs), start)", ["w * e"]),
        ("x = step(x + h / 2 * f, share=0.5)", ["x", "h / 2 * f", "0.5"]),
        ("LEVELS = (14.6, 0.03)", ["14.6", "0.03"]),
        ("rule = lambda x, s: x + (s - 1) * d", ["x", "(s - 1) * d", "s", "1"]),
        ("def f(t, rho: float = 7.0, *, a: float = -1.2): return t", ["7.0", "1.2"]),
        ("return torch.ones_like(t)", ["torch.ones_like(t)"]),
        ("if cold: y = a * b\nelse: y = c if d > 1.5 else e + f", ["a * b", "e", "f"]),
        ("total += share", ["share"]),
        ("y = 2 * a + 2 * a", ["2 * a", "2 * a [2]"]),
    ],
)  # fmt: skip
def test_its_mutants(source: str, expected: list[str]):
    assert sorted(expressions(source)) == sorted(expected)


@pytest.mark.parametrize(
    "source",
    [
        "y = table[i + 1]",
        "y = nodes[1 - order:]",
        "def f(t):\n    below = (t * n).floor().long()\n    return table[below]",
        "def f(path):\n    count = steps - 1\n    return torch.arange(count)",
        "y = [x for i in range(1, n + 1)]",
        "y = torch.zeros(n + 1, 3 * n)",
        "y = x.reshape(-1, 2 * n).flatten(1).sum(1)",
        "y = gauss_legendre(24)",
        "def f(x, order: int = 3): return x",
        "steps, share, on = 1000, 0.0, True",
        "y = n // 2",
        "left -= 1",
        "while a + b > 1.5: pass",
        "y = abs(a - b) < 1e-6 * c",
        "assert a + b",
        "raise ValueError(f'{a + b}', a * b)",
        "y = f'{100 * share:.1f}'",
        "y = [1] * (x.ndim - 1)",
    ],
)
def test_what_it_leaves_alone(source: str):
    assert expressions(source) == []


def test_each_mutant_is_another_program():
    source = (SCRIPT.parents[1] / "ldm" / "samplers" / "steps.py").read_text()
    mutants = mutation.mutants_of("ldm/samplers/steps.py", source)
    assert any(mutant.id.endswith(": end.sigma / start.sigma * (x - start.alpha * x0)") for mutant in mutants)
    texts = [ast.unparse(mutation.mutated(source, mutant.place, 1.07)) for mutant in mutants]
    assert len({ast.unparse(ast.parse(source)), *texts}) == len(mutants) + 1
    assert all(text.count("* 1.07") == 1 for text in texts)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)


def test_it_finds_every_file_of_the_mathematics():
    done = run("--list")
    found = {line.split(":")[0] for line in done.stdout.splitlines()[:-1]}
    for file in ("samplers/steps", "diffusion/objective", "diffusion/table_paths", "samplers/guidance"):
        assert f"ldm/{file}.py" in found
    assert done.returncode == 0 and not [line for line in found if "test" in line]
    (only,) = run("--list", "--only", "ldm/samplers/steps.py:").stdout.splitlines()[-1:]
    assert 0 < int(only.split()[0]) < int(done.stdout.splitlines()[-1].split()[0])


def test_help_needs_no_torch():
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", str(SCRIPT), "--help"], capture_output=True, text=True, timeout=60
    )
    assert loaded.returncode == 0 and "--at-least" in loaded.stdout
    assert "argparse" in loaded.stderr and "torch" not in loaded.stderr


SOURCE = """
def line(x):
    return 2.0 * x + 3.0

def below(x):
    while x > 0.5:
        x = x - 1.0  # 1.03 x grows for ever
    return x

def unseen(x):
    return 5.0 * x
"""
TESTS = """
from throwaway.formulas import below, line, unseen

def test_line():
    assert line(1.0) == 5.0

def test_below():
    assert abs(below(40.2) - 0.2) < 1e-9

def test_unseen():
    unseen(1.0)
"""


def throwaway(root: Path, tests: str) -> list[str]:
    """A package and its tests; the arguments that name them."""
    for file, text in (("throwaway/__init__.py", ""), ("throwaway/formulas.py", SOURCE), ("checks/test_all.py", tests)):
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text(text)
    return [
        "--root",
        str(root),
        "--target",
        "throwaway",
        "--tests",
        "checks",
        "--preload",
        "pytest",
        "hypothesis",
        "anyio",
    ]


def test_what_tests_see_is_caught_and_what_they_do_not_survives(tmp_path: Path):
    arguments = [*throwaway(tmp_path, TESTS), "--limit", "3"]
    before = sorted(tmp_path.rglob("*"))
    done = run(*arguments, "--json", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    outcomes = {row["id"].removeprefix(f"{row['file']}:"): (row["outcome"], row["by"]) for row in found["mutants"]}
    assert outcomes == {
        "3: 2.0 * x": ("caught", "checks/test_all.py::test_line (AssertionError)"),
        "3: 3.0": ("caught", "checks/test_all.py::test_line (AssertionError)"),
        "7: x": ("timeout", "not done in 3 s"),
        "7: 1.0": ("caught", "checks/test_all.py::test_below (AssertionError)"),
        "11: 5.0 * x": ("survived", ""),
    }
    assert done.returncode == 1 and found["share"] == 0.8
    assert done.stdout.splitlines()[-2:] == ["1 survive", "throwaway/formulas.py:11: 5.0 * x"]
    (tmp_path / "found.json").unlink()
    assert sorted(tmp_path.rglob("*")) == before  # no cache, no bytecode
    assert run(*arguments, "--only", ":3:").returncode == 0


@pytest.mark.parametrize(
    ("tests", "complaint"),
    [
        ("def test_all():\n    assert False", "not green .*: checks/test_all.py::test_all (AssertionError)"),
        ("def test_all():\n    pass", "not green .*: no test imports throwaway"),
    ],
)
def test_it_refuses_to_measure_by_tests_that_say_nothing(tmp_path: Path, tests: str, complaint: str):
    done = run(*throwaway(tmp_path, tests))
    assert done.returncode == 1 and "caught" not in done.stdout
    pattern = complaint.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(SystemExit, match=pattern):
        raise SystemExit(done.stderr)
