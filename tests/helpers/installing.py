"""Our package as users install it: built from a copy of the sources, in an environment of its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

from helpers.forking import ROOT

CODE = ("ldm", "vae", "text", "data")
SHIPPED = ("latent_foundry.py", "txt2img.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


def sources(copy: Path) -> Path:
    """Copy what a build needs of the repository: building writes into the folder that it builds from."""
    for name in CODE:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SHIPPED:
        shutil.copy(ROOT / name, copy)
    return copy


def installed(source: Path, out: Path, kind: str) -> Path:
    """Return the interpreter of an empty environment that has our package alone, and what it depends on from this one.

    kind: "wheel" or "editable".
    """
    build = f"import sys, setuptools.build_meta as backend; backend.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(out)], cwd=source, check=True, capture_output=True, text=True)
    (wheel,) = out.glob("*.whl")
    venv.create(out / "environment", with_pip=False, symlinks=True)
    python = out / "environment" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True, text=True)
    site = next((out / "environment").glob("lib/python*/site-packages"))
    # A folder in a .pth file is searched, but the .pth files in it are not read: not this environment's link to us.
    dependencies = Path(sysconfig.get_path("purelib"))
    (site / "zz-dependencies.pth").write_text(f"{dependencies}\n")
    (out / "environment/bin/ninja").symlink_to(Path(sys.executable).with_name("ninja"))  # DeepSpeed compiles with it
    for hook in dependencies.glob("distutils-precedence.pth"):  # setuptools', without which it warns
        shutil.copy(hook, site / f"zzz-{hook.name}")
    return python
