"""Change the mathematics one coefficient at a time, and list the changes that the tests do not notice.

    python benchmarks/mutation.py --jobs 2 --json outputs/mutation.json
    python benchmarks/mutation.py --only ldm/samplers/steps.py --factor 1.01

A mutant has one sub-expression e of a formula replaced by e * 1.03: a number, a term of a sum, a product or quotient, a
power, a value of exp, log, sqrt and their like. It is caught if a test fails. One mutant is made where several would be
equal: a product is scaled as one, not each factor; of sqrt(e) and e^2 the value, not e; of -e, sum(e, axis),
reshape(e) and .to(...) only e. Of a sum the terms are scaled, and the sum itself only if it is a factor.

Left alone, because they are positions, choices or counts, not amounts: subscripts and slices; the definitions of names
that occur in them, or in range and arange; shapes, axes and integers as arguments or defaults; integer exponents; //
and %; tests of if and while; comparisons (tolerances too); finfo's eps; asserts and raised errors; zeros.

Nothing is written to the working tree: each mutant runs in a forked process, where it is loaded in its module's place.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("ldm/samplers", "ldm/diffusion")
TESTS = ("tests/ldm/samplers", "tests/ldm/diffusion")
ONE_FORK = threading.Lock()
PRELOAD = ("torch", "diffusers", "hypothesis", "pytest")

MODULES = {"torch", "math", "F"}  # heads of dotted names that are not what a method is called on
CURVED = set("exp expm1 log log1p log2 sin cos tan sinh cosh tanh sigmoid logsigmoid logit ndtri softplus erf".split())
SCALING = set("sqrt rsqrt square abs norm std prod".split())  # f(c e) is f(e) times a number
# f(c e) = c f(e), of the first argument; the others are axes, dtypes and the like.
PASSING = set("sum mean cumsum flatten reshape flip diag to item float double tensor expand_times _per_sample".split())
JOINING = set("where lerp clamp cat stack max min full_like linspace".split())  # several arguments are values
ONES, ZEROS = {"ones", "ones_like"}, {"zeros", "zeros_like", "new_zeros"}
COUNTING = {"range", "arange", "zeros", "ones", "empty"}  # their arguments say how many
CONSTANT = COUNTING | ONES | ZEROS | {"len", "factorial", "finfo"}  # no formula is looked for within

# How an expression stands in the formula around it. "alone": assigned, returned or passed on, where a bare name is the
# formula of another place. "term": here a bare name counts. "scaled": a factor of what is scaled already.
Role = Literal["alone", "term", "scaled"]


class Formulas:
    """Collect the expressions to scale, in `found`."""

    def __init__(self, tree: ast.Module) -> None:
        self.found: list[ast.expr] = []
        self.counts: set[str] = set()  # names of the function's indices and numbers of things
        self.look(tree)

    def all(self, nodes: Iterable[ast.AST | None], role: Role = "alone") -> None:
        for node in nodes:
            self.look(node, role)

    def take(self, node: ast.expr, role: Role) -> None:
        if role != "scaled":
            self.found.append(node)

    def look(self, node: ast.AST | None, role: Role = "alone") -> None:
        match node:
            case ast.Compare() | ast.Assert() | ast.Raise() | ast.JoinedStr() | ast.BinOp(left=ast.List()) | None:
                pass
            case ast.If() | ast.While() | ast.IfExp():
                self.all((child for child in ast.iter_child_nodes(node) if child is not node.test), role)
            case ast.FunctionDef():
                outer, self.counts = self.counts, self.counts | counting_names(node)
                self.all(ast.iter_child_nodes(node))
                self.counts = outer
            case ast.Assign(targets=[target], value=value) | ast.AnnAssign(target=target, value=value):
                if not (isinstance(target, ast.Name) and target.id in self.counts):
                    self.look(value)
            case ast.AugAssign(value=value):
                self.look(None if whole_number(value) else value, "term")
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
                self.all((left, right), "term")
            case ast.BinOp(left=left, op=ast.Mult() | ast.Div() | ast.MatMult() | ast.Pow() as op, right=right):
                self.take(node, role)
                self.look(left, "scaled")
                self.look(right, "term" if isinstance(op, ast.Pow) and not whole_number(right) else "scaled")
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                self.look(operand, role)
            case ast.Constant(value=float() | int() as number) if number and not isinstance(number, bool):
                if role == "term" or isinstance(number, float):
                    self.take(node, role)
            case ast.Call():
                self.call(node, role)
            case ast.Name() | ast.Attribute(value=ast.Name() | ast.Attribute()) | ast.Subscript():
                if role == "term":
                    self.take(node, role)
                self.look(node.value if isinstance(node, ast.Subscript) else None)
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element):
                self.look(element, role)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):  # one is scaled: that is not the product's mutant
                self.all(parts, "alone" if role == "alone" else "term")
            case _:
                self.all(ast.iter_child_nodes(node))

    def call(self, node: ast.Call, role: Role) -> None:
        name, operands = called(node)
        if name in CONSTANT:
            if name in ONES or (role == "term" and name not in ZEROS):
                self.take(node, role)
        elif name in CURVED | SCALING:
            self.take(node, role)
            self.all(operands[:1], "term" if name in CURVED else "scaled")
        elif name in PASSING:
            self.all(operands[:1], role)
        elif name in JOINING:
            # A condition stands first, or in x.where(condition, y) second.
            other = {"full_like": 0, "linspace": 2, "where": len(operands) - len(node.args)}.get(name)
            self.all((part for i, part in enumerate(operands) if i != other), "term")
            self.all((keyword.value for keyword in node.keywords if keyword.arg in ("min", "max")), "term")
        else:
            if role == "term":
                self.take(node, role)
            self.all([*operands, *[keyword.value for keyword in node.keywords]])


def called(node: ast.Call) -> tuple[str, list[ast.expr]]:
    """Return the function's last name, and its operands: the object of a method comes first."""
    if not isinstance(node.func, ast.Attribute):
        return ast.unparse(node.func), node.args
    owner = ast.unparse(node.func.value)
    is_module = owner.replace(".", "").isidentifier() and owner.split(".")[0] in MODULES
    return node.func.attr, [*([] if is_module else [node.func.value]), *node.args]


def whole_number(node: ast.expr) -> bool:
    return ast.unparse(node).lstrip("-").isdigit()


def counting_names(function: ast.AST) -> set[str]:
    """Return names that occur in subscripts, or as counts in range, arange and the like; in len(x), x does not."""
    calls = [called(node) for node in ast.walk(function) if isinstance(node, ast.Call)]
    places = [node.slice for node in ast.walk(function) if isinstance(node, ast.Subscript)]
    places += [part for name, parts in calls if name in COUNTING for part in parts]
    names = {node.id for place in places for node in ast.walk(place) if isinstance(node, ast.Name)}
    return names - {ast.unparse(parts[0]) for name, parts in calls if name == "len"}


class Mutant(NamedTuple):
    id: str  # file, line and expression
    file: str
    place: int  # of the expression, among all nodes of the file's tree


def mutants_of(file: str, source: str) -> list[Mutant]:
    tree = ast.parse(source)
    places = {id(node): place for place, node in enumerate(ast.walk(tree))}
    names, mutants = [], []
    for node in sorted(Formulas(tree).found, key=lambda node: (node.lineno, node.col_offset)):
        names.append(f"{file}:{node.lineno}: {ast.unparse(node)}")
        number = f" [{names.count(names[-1])}]" if names.count(names[-1]) > 1 else ""
        mutants.append(Mutant(names[-1] + number, file, places[id(node)]))
    return mutants


class Scale(ast.NodeTransformer):
    """Replace one node e by e * factor."""

    def __init__(self, node: ast.expr, factor: float) -> None:
        self.node, self.factor = node, factor

    def visit(self, node: ast.AST) -> Any:
        if node is not self.node:
            return self.generic_visit(node)
        return ast.copy_location(ast.BinOp(self.node, ast.Mult(), ast.Constant(self.factor)), node)


def mutated(source: str, place: int, factor: float) -> ast.Module:
    tree = ast.parse(source)
    node: Any = list(ast.walk(tree))[place]
    return ast.fix_missing_locations(Scale(node, factor).visit(tree))


class Instead(SourceFileLoader):
    """Find and load a tree as the module of a file, whatever the file and its cached bytecode contain."""

    def __init__(self, root: Path, file: str, tree: ast.Module) -> None:
        super().__init__(file.removesuffix(".py").removesuffix("/__init__").replace("/", "."), str(root / file))
        self.tree = tree

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None

    def get_code(self, fullname: str) -> Any:
        return compile(self.tree, self.path, "exec")


class FirstFailure:
    """A pytest plugin that records the first failure: a test, or a file that could not be read."""

    shown = ""

    def pytest_exception_interact(self, node: Any, call: Any) -> None:
        self.shown = self.shown or f"{node.nodeid} ({call.excinfo.typename})"


class Verdict(NamedTuple):
    outcome: str  # survived, caught, timeout or crashed: all but the first are caught
    by: str  # the test, or what else there is to say
    seconds: dict[str, float]  # that each file of tests took


def run_tests(root: Path, tests: Sequence[str], trees: dict[str, ast.Module], answer: Connection) -> None:
    """Run the tests in a separate process, file after file until one fails, with these trees as the modules."""
    os.chdir(root)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(root))
    instead = [Instead(root, file, tree) for file, tree in trees.items()]
    sys.meta_path[:0] = instead
    pytest = importlib.import_module("pytest")
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-p", "no:faulthandler", f"--rootdir={root}"]
    seconds = {}
    for test in tests:
        started, first = time.monotonic(), FirstFailure()
        code = pytest.main([*options, test], plugins=[first])
        seconds[test] = time.monotonic() - started
        if code:
            return answer.send(Verdict("caught", first.shown or f"{test}: pytest ends with {int(code)}", seconds))
    unread = [module.name for module in instead if module.name not in sys.modules]
    answer.send(Verdict("survived", f"no test imports {', '.join(unread)}" if unread else "", seconds))


def judge(root: Path, tests: Sequence[str], trees: dict[str, ast.Module], limit: float) -> Verdict:
    forking = multiprocessing.get_context("fork")
    with ONE_FORK:  # so that no other process inherits `child`, and the pipe ends where this one does
        answer, child = forking.Pipe(duplex=False)
        process = forking.Process(target=run_tests, args=(root, tests, trees, child), daemon=True)
        process.start()
        child.close()
    try:
        return answer.recv() if answer.poll(limit) else Verdict("timeout", f"not done in {limit:.0f} s", {})
    except EOFError:
        return Verdict("crashed", "the process ended without a verdict", {})
    finally:
        process.kill()
        process.join()


def telling_first(tests: Sequence[str], file: str, seconds: dict[str, float]) -> list[str]:
    """Sort the tests: the file's own, then its neighbours', the quick ones first."""
    path = Path("tests", file)
    mirrors = {str(path.with_name(f"test_{path.name}")), f"{path.parent.parent}/test_{path.parent.name}.py"}
    return sorted(tests, key=lambda t: (t not in mirrors, -len(os.path.commonpath([t, str(path)])), seconds[t]))


def python_files(root: Path, names: Sequence[str], pattern: str) -> list[str]:
    """Return these files, and those of these folders. Raises SystemExit for paths that do not exist."""
    for name in names:
        if not (root / name).exists():
            raise SystemExit(f"{name} is neither a file nor a folder of {root}")
    paths = [p for name in names for p in ([root / name] if (root / name).is_file() else (root / name).rglob(pattern))]
    return sorted({path.relative_to(root).as_posix() for path in paths})


def table(mutants: Sequence[Mutant], verdicts: Sequence[Verdict]) -> str:
    """Format mutants, caught and fraction of each file and of all, and then the survivors."""
    rows = [f"{'file':40} {'mutants':>7} {'caught':>6} {'in time':>7} {'share':>6}"]
    for name in (*dict.fromkeys(mutant.file for mutant in mutants), "all"):
        found = [v.outcome for mutant, v in zip(mutants, verdicts, strict=True) if name in (mutant.file, "all")]
        caught, late = len(found) - found.count("survived"), found.count("timeout")
        rows.append(f"{name:40} {len(found):7} {caught:6} {caught - late:7} {caught / len(found):6.1%}")
    survivors = [mutant.id for mutant, v in zip(mutants, verdicts, strict=True) if v.outcome == "survived"]
    return "\n".join([*rows, "", f"{len(survivors)} survive", *survivors])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", default=TARGETS, help="files and folders to break")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files and folders of tests that should notice")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    parser.add_argument("--factor", type=float, default=1.03, choices=[1 + percent / 100 for percent in range(1, 11)])
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each")
    parser.add_argument("--limit", type=float, help="seconds for a mutant; else five times what all tests take")
    parser.add_argument("--only", default="", metavar="TEXT", help="only mutants whose id contains it")
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts there")
    parser.add_argument("--at-least", type=float, default=0.95, help="fraction to catch; below it the exit code is 1")
    parser.add_argument("--preload", nargs="*", default=PRELOAD, help="what is imported once, before all processes")
    return parser.parse_args()


def survey(args: argparse.Namespace, mutants: list[Mutant], sources: dict[str, str]) -> list[Verdict]:
    """Return a verdict for each mutant. The sources are read once, because others may edit the files meanwhile."""
    for name in args.preload:
        importlib.import_module(name)
    root, tests = args.root.resolve(), python_files(args.root, args.tests, "test_*.py")
    print(f"{len(mutants)} mutants; first the {len(tests)} files of tests with nothing broken", flush=True)
    trees = {file: ast.parse(ast.unparse(ast.parse(source))) for file, source in sources.items()}
    whole = judge(root, tests, trees, limit=86400)
    if whole.outcome != "survived" or whole.by:
        raise SystemExit(f"the tests are not green before anything is broken: {whole.by}")
    limit = args.limit or 60 + 5 * sum(whole.seconds.values())

    def judged(mutant: Mutant) -> Verdict:
        trees = {mutant.file: mutated(sources[mutant.file], mutant.place, args.factor)}
        return judge(root, telling_first(tests, mutant.file, whole.seconds), trees, limit)

    verdicts = []
    with ThreadPoolExecutor(args.jobs) as pool:
        found = tqdm(pool.map(judged, mutants), total=len(mutants), mininterval=5)
        for mutant, verdict in zip(mutants, found, strict=True):
            verdicts.append(verdict)
            if verdict.outcome != "caught":
                tqdm.write(f"{verdict.outcome}: {mutant.id}")
    return verdicts


def main() -> int:
    args = parse()
    sources = {file: (args.root / file).read_text() for file in python_files(args.root, args.target, "*.py")}
    mutants = [m for file, source in sources.items() for m in mutants_of(file, source) if args.only in m.id]
    if args.list or not mutants:
        print(*[mutant.id for mutant in mutants], f"{len(mutants)} mutants", sep="\n")
        return 0 if mutants else 1
    os.environ["OMP_NUM_THREADS"] = "1"
    with TemporaryDirectory() as scratch:
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = scratch
        verdicts = survey(args, mutants, sources)
    share = sum(verdict.outcome != "survived" for verdict in verdicts) / len(mutants)
    print(table(mutants, verdicts))
    if args.json:
        rows = [m._asdict() | verdict._asdict() for m, verdict in zip(mutants, verdicts, strict=True)]
        args.json.write_text(json.dumps({"factor": args.factor, "share": share, "mutants": rows}, indent=1))
    return int(share < args.at_least)


if __name__ == "__main__":
    sys.exit(main())
