"""Find the weights in a part's folder: one file, in full or half precision, or an index of several."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath

from ldm.files.strict_json import read_json
from ldm.interop.network_files import described_by
from ldm.interop.weight_reader import Weights, open_weights

WEIGHTS_STEM, TEXT_STEM = "diffusion_pytorch_model", "model"  # diffusers', transformers'
OLD_TEXT_STEM = "pytorch_model"  # of transformers' pickles
MAX_SHARDS = 1000


def find_weights(folder: Path, stem: str) -> Weights:
    """Open the weights of a folder in diffusers' or transformers' layout, preferring safetensors and full precision.

    Raises ValueError or FileNotFoundError, naming the file.
    """
    old_stem = OLD_TEXT_STEM if stem == TEXT_STEM else stem
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{old_stem}.bin", f"{old_stem}.fp16.bin"):
        index = folder / _index_name(name)
        if (folder / name).exists():
            return open_weights(folder / name)
        if index.exists():
            return open_weights(*_shards(index))
    raise FileNotFoundError(f"{folder / stem}.safetensors is missing: give the folder of a complete model")


def _index_name(name: str) -> str:
    """Return the index's name, with the variant where diffusers puts it: model.fp16.safetensors has
    model.safetensors.index.fp16.json."""
    stem, *variant, kind = name.split(".")
    return ".".join([stem, kind, "index", *variant, "json"])


def _shards(index: Path) -> list[Path]:
    """Read the file names of an index. Raises ValueError for a file outside its folder."""
    with described_by(index):
        named = read_json(index)["weight_map"].values()
        if not all(isinstance(name, str) for name in named):
            raise ValueError("its weight_map does not name files: copy it again")
        names = sorted(set(named))
        if not 1 <= len(names) <= MAX_SHARDS:
            raise ValueError(f"it names {len(names)} files, expected 1 to {MAX_SHARDS}")
        for name in names:
            if PurePosixPath(name).name != name or PureWindowsPath(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"it names a file elsewhere, {name!r}: refused; the files must be next to it")
    return [index.with_name(name) for name in names]
