"""Import our packages under unambiguous names, whatever other packages have the short ones.

In the repository, `from data.shards import …` finds data/shards.py. Anywhere else `data` may be a folder of pictures,
a data.py or another package, so outside the repository vae, text and data are loaded as `ldm.vae`, `ldm.text` and
`ldm.data`: from the folders next to this file, or from within ldm/ if they are installed. And if another package is
called `ldm` (CompVis' code is), everything is loaded below the name of this module:

    from latent_foundry import TextToImage

If a module is loaded under a longer name, the names in its own `from … import` lines are made longer as well, in its
compiled code; its file and all other imports are unchanged. If the short names are ours, the longer ones refer to the
same modules: `ldm.vae.autoencoder is vae.autoencoder`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, cast

HERE = Path(__file__).resolve().parent
SIBLINGS = ("vae", "text", "data")
# Their folder: next to ldm/ in the repository, within it if installed.
SHELF = HERE if (HERE / "vae").is_dir() else HERE / "ldm"
FOLDERS = (HERE / "ldm", *(SHELF / name for name in SIBLINGS))
# The names that the package itself provides, imported at first use.
OFFERED = {
    "DrawOptions": "inference.options",
    "DrawRequest": "inference.request",
    "Drawing": "inference.recipe",
    "TextToImage": "inference.pipeline",
    "autoguidance": "samplers.guidance",
    "invert": "samplers.single_step",
    "log_likelihood": "samplers.likelihood",
}


def offered(package: str, name: str) -> Any:
    """Return the object for `from package import name`. Raises AttributeError for an unknown name."""
    if name not in OFFERED:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{package}.{OFFERED[name]}"), name)


def renamed(code: CodeType, names: Mapping[str, str]) -> CodeType:
    """Return the same code, but importing `names[first].rest` instead of `first.rest`.

    Among the names in compiled code only those of modules contain a dot, so nothing else changes; and our code never
    imports a package by a name without a dot.
    """

    def longer(name: str) -> str:
        first, dot, rest = name.partition(".")
        return names.get(first, first) + dot + rest if dot else name

    constants = (renamed(value, names) if isinstance(value, CodeType) else value for value in code.co_consts)
    return code.replace(co_names=tuple(map(longer, code.co_names)), co_consts=tuple(constants))


class RenamingLoader(SourceFileLoader):
    """Loads one of our files under a longer name than the one in the imports of the others."""

    def __init__(self, fullname: str, path: str, names: Mapping[str, str]) -> None:
        super().__init__(fullname, path)
        self.names = names

    def get_code(self, fullname: str) -> CodeType | None:
        code = super().get_code(fullname)
        return renamed(code, self.names) if code is not None else None


class RenamingFinder(MetaPathFinder):
    """Finds our modules below `package`, including the siblings."""

    def __init__(self, package: str, names: Mapping[str, str]) -> None:
        self.package, self.names = package, names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(self.package + "."):
            return None
        sibling = fullname.removeprefix(self.package + ".") in SIBLINGS
        spec = PathFinder.find_spec(fullname, [str(SHELF)] if sibling else path)
        if spec is None or not isinstance(spec.loader, SourceFileLoader) or not _is_ours(spec):
            return spec
        spec.loader = RenamingLoader(fullname, spec.loader.path, self.names)
        return spec


class SameModuleLoader(Loader):
    """Returns a module that is already known under another name."""

    def __init__(self, known: ModuleSpec) -> None:
        self.known = known

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.known.name)
        self.known = module.__spec__ or self.known
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.known  # The import system has just replaced it.

    def get_code(self, fullname: str) -> CodeType | None:
        """For `python -m`."""
        return cast(SourceFileLoader, self.known.loader).get_code(self.known.name)


class SameModuleFinder(MetaPathFinder):
    """Finds the module `short.rest` under the name `long.rest`, for each `long: short` in `names`."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        for long, short in self.names.items():
            if fullname == long and "." in long or fullname.startswith(long + "."):
                if (known := find_spec(short + fullname.removeprefix(long))) is None:
                    return None
                package = known.submodule_search_locations is not None
                return ModuleSpec(fullname, SameModuleLoader(known), origin=known.origin, is_package=package)
        return None


def _is_ours(spec: ModuleSpec) -> bool:
    return spec.origin is not None and any(Path(spec.origin).resolve().is_relative_to(folder) for folder in FOLDERS)


def _finds_ours(name: str) -> bool:
    """Return whether `import name` currently finds one of our packages."""
    loaded = sys.modules.get(name)
    spec = find_spec(name) if loaded is None else loaded.__spec__
    return spec is not None and _is_ours(spec)


def find_below_ldm() -> None:
    """Make `ldm.vae`, `ldm.text` and `ldm.data` importable. Called once, by ldm itself."""
    long = {name: f"ldm.{name}" for name in SIBLINGS}
    if all(map(_finds_ours, SIBLINGS)):
        sys.meta_path.insert(0, SameModuleFinder({long[name]: name for name in SIBLINGS}))
    else:
        sys.meta_path.insert(0, RenamingFinder("ldm", long))


def find_below_this() -> None:
    """Make `latent_foundry.model`, `latent_foundry.vae` and everything else importable."""
    if _finds_ours("ldm"):
        sys.meta_path.insert(0, SameModuleFinder({__name__: "ldm"}))
    else:
        names = {"ldm": __name__} | {name: f"{__name__}.{name}" for name in SIBLINGS}
        sys.meta_path.insert(0, RenamingFinder(__name__, names))


__path__ = [str(HERE / "ldm")]  # Makes a package of this module.


def __getattr__(name: str) -> Any:
    return offered(__name__, name)


find_below_this()
