"""Find models in the cache of the Hugging Face Hub, without a network and without its library.

huggingface_hub's documentation ("Understand caching") describes the layout: models--OWNER--NAME/ holds blobs/, files
named by the hash of their content; snapshots/REVISION/, whose files are links to ../../blobs/HASH; and refs/main, the
newest revision.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ldm.files.paths import user_path

MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+")
BLOB = re.compile(r"[0-9a-f]+")  # git's or SHA-256's digits
SNAPSHOTS, BLOBS, PREFIX = "snapshots", "blobs", "models--"
RUNS = "runs"  # the folder of runs, before there is one


def model_path(given: str | Path) -> Path:
    """Return the path itself if it exists, or is no name of a model on the Hub; otherwise its folder in the cache, if
    that has one."""
    path = user_path(given)
    return path if path.exists() else _newest_snapshot(path) or path


def missing_model(path: Path) -> str:
    """Return the error for a path at which there is no model; what to give instead stands at its end."""
    if MODEL_ID.fullmatch(str(path)) and not path.parent.exists() and path.parent.name != RUNS:
        return (
            f"there is no model at {path}, nor one of that name in the Hub's cache ({cache_folder()}), and nothing is "
            f"downloaded: run `hf download {path}`, or give the folder or file of a model"
        )
    return f"there is no model at {path}: give the folder or file of one"


def cache_folder() -> Path:
    """Return the cache's folder, by the environment variables of huggingface_hub, in its order."""
    found = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if found:
        return Path(found).expanduser()
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("HF_HOME") or Path(general) / "huggingface").expanduser() / "hub"


def _newest_snapshot(path: Path) -> Path | None:
    if not MODEL_ID.fullmatch(str(path)):
        return None
    repository = cache_folder() / (PREFIX + str(path).replace("/", "--"))
    known = {entry.name: entry for entry in repository.glob(f"{SNAPSHOTS}/*") if entry.is_dir()}
    main = repository / "refs" / "main"
    named = main.read_text(errors="replace").strip() if main.is_file() else ""
    newest = max(known.values(), key=lambda entry: entry.stat().st_mtime, default=None)
    return known.get(named, newest)


def is_own_file(file: Path, folder: Path) -> bool:
    """Return whether the file, its links followed, lies in the folder, or in the cache's repository that the folder is
    a snapshot of, under a name that its content gives it. Any other link may lead to something private."""
    target, inside = file.resolve(), folder.resolve()
    if target.is_relative_to(inside):
        return True
    repositories = [place.parent for place in (inside, *inside.parents) if place.name == SNAPSHOTS]
    return any(target.parent == place / BLOBS and BLOB.fullmatch(target.name) for place in repositories)


def repository_name(path: Path) -> str | None:
    """Return the model's name if the path is a snapshot in the cache, or in one; otherwise None."""
    for place in path.parents:
        if place.name == SNAPSHOTS and place.parent.name.startswith(PREFIX):
            return place.parent.name.rpartition("--")[2]
    return None
