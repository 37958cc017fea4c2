"""Read textual inversions: A1111's .pt files, diffusers' learned_embeds, and safetensors with `emb_params`.

The forms are those that modules/textual_inversion of A1111, loaders/textual_inversion.py of diffusers and
comfy/sd1_clip.py of ComfyUI read. Nothing in a file is executed: see ldm.interop.pickles.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.files.paths import user_path
from ldm.interop.pickles import TENSORS, is_pickle, load_plain
from ldm.interop.weight_reader import FLOATS, is_finite, open_weights
from ldm.model.conditioner import Conditioner
from text.embeddings import SUFFIXES, Embedding

MAX_FILE_BYTES = 2**26  # 75 vectors take 300 kB; an optimiser's state may come with them
UNNAMED = ("emb_params", "*", "clip_l", "clip_h")  # names that are no token of diffusers
PARAMETERS = "string_to_param"
OF_SDXL = "clip_g"
OF_THE_OUTPUT = "_out"
MODELS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL"}


@dataclass(frozen=True, kw_only=True)
class EmbeddingSource:
    """A file with an embedding, or a folder of such files. name: of a file's embedding; "": its own."""

    path: Path
    name: str = ""


def embedding_source(given: str | Path | tuple[str | Path, str]) -> EmbeddingSource:
    """Create a source of a path, or of a file and a name for it."""
    path, name = given if isinstance(given, tuple) else (given, "")
    return EmbeddingSource(path=user_path(path), name=name)


def with_embeddings(conditioner: Conditioner, sources: Sequence[EmbeddingSource]) -> Conditioner:
    """Return the conditioner with embeddings that captions may use.

    Raises ValueError or FileNotFoundError, naming the file, for one that is missing or damaged, or made for another
    model. In a folder, such files are left out, with a warning if they are not of another model.
    """
    if not sources:
        return conditioner
    if len(conditioner.towers) != 1:
        raise ValueError("the model has several text encoders, for which embeddings are not supported: leave them out")
    width, most = conditioner.width, conditioner.context_length - 2
    found: dict[str, Embedding] = {}
    for source in sources:
        if not source.path.is_dir():
            one = read_embedding(source.path, source.name)
            _check_fits(one, source.path, width=width, most=most)
            found[one.name.lower()] = one
            continue
        if source.name:
            raise ValueError(f"{source.path} is a folder, which cannot be named {source.name!r}: give one of its files")
        for one in _in_folder(source.path, width=width, most=most):
            found.setdefault(one.name.lower(), one)
    return Conditioner(*conditioner.towers, embeddings=list(found.values()))


def read_embedding(path: Path, name: str = "") -> Embedding:
    """Read a file's embedding. Raises ValueError or FileNotFoundError for a file that has none, or more than one."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no embedding at {path}: give its file, or a folder of such files")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, more than any embedding: give a textual inversion")
    return _embedding(_vectors(path), name, path)


def _embedding(found: dict[str, Tensor], name: str, path: Path) -> Embedding:
    if OF_SDXL in found:
        raise ValueError(f"{path} is an embedding for SDXL: give one for the model")
    if len(found) != 1:
        raise ValueError(f"{path} has {len(found)} tensors, expected the vectors of one embedding: give another file")
    ((token, vectors),) = found.items()
    vectors = vectors[None] if vectors.ndim == 1 else vectors
    if vectors.ndim != 2 or not len(vectors) or vectors.dtype not in FLOATS or not is_finite(vectors):
        shape = tuple(vectors.shape)
        raise ValueError(f"{path} has values of shape {shape} that are no vectors of finite numbers: get it again")
    return Embedding(name or path.stem, vectors.detach().to(torch.float32, copy=True), _token(token), path)


def with_bundled(conditioner: Conditioner, bundled: Mapping[str, dict[str, Tensor]], path: Path) -> Conditioner:
    """Return the conditioner with the embeddings of a LoRA's file: a name that it has already keeps its embedding.

    One that does not fit the model is left out, with a warning.
    """
    table = conditioner.embeddings
    found = {one.name.lower(): one for one in (table.embeddings if table else ())}
    width, most = conditioner.width, conditioner.context_length - 2
    for name, tensors in bundled.items():
        # OneTrainer may write vectors for the text encoder's output too.
        if added := [key for key in tensors if key.endswith(OF_THE_OUTPUT) and tensors[key].any()]:
            warnings.warn(f"{path}: {added[0]} of the embedding {name} is not supported: left out", stacklevel=2)
        try:
            one = _embedding(
                {key: tensor for key, tensor in tensors.items() if not key.endswith(OF_THE_OUTPUT)}, name, path
            )
            _check_fits(one, path, width=width, most=most)
            found.setdefault(name.lower(), replace(one, token=""))
        except ValueError as error:
            warnings.warn(f"the embedding {name} is left out: {error}", stacklevel=2)
    return Conditioner(*conditioner.towers, embeddings=list(found.values()))


def _in_folder(folder: Path, *, width: int, most: int) -> list[Embedding]:
    found: list[Embedding] = []
    for path in sorted(folder.rglob("*")):
        if path.suffix not in SUFFIXES or not path.is_file():
            continue
        try:
            one = read_embedding(path)
            if one.vectors.shape[1] == width:
                _check_fits(one, path, width=width, most=most)
                found.append(one)
        except (ValueError, OSError) as error:
            warnings.warn(f"left out: {error}", stacklevel=4)
    return found


def _check_fits(one: Embedding, path: Path, *, width: int, most: int) -> None:
    count, wide = one.vectors.shape
    if wide != width:
        ours, theirs = (f" ({MODELS[size]})" if size in MODELS else "" for size in (width, wide))
        raise ValueError(
            f"{path} has vectors of width {wide}{theirs}, expected {width}{ours}: give one made for this model"
        )
    if count > most:
        raise ValueError(f"{path} has {count} vectors, expected at most {most}, as many as a prompt has tokens")


def _vectors(path: Path) -> dict[str, Tensor]:
    """Return the tensors that are vectors, by their names in the file."""
    if not is_pickle(path):
        return dict(open_weights(path).tensors)
    content = load_plain(path)
    if isinstance(content, dict) and isinstance(content.get(PARAMETERS), dict):
        return _tensors(content[PARAMETERS])
    if isinstance(content, list):  # ComfyUI joins them
        each = [tensor for item in content if isinstance(item, dict) for tensor in _tensors(item).values()]
        each = [tensor.reshape(-1, tensor.shape[-1]) for tensor in each if tensor.ndim]
        if len({(tensor.shape[1], tensor.dtype) for tensor in each}) > 1:
            raise ValueError(f"{path} has vectors of several widths: give an embedding for one text encoder")
        return {"*": torch.cat(each)} if each else {}
    return _tensors(content) if isinstance(content, dict) else {}


def _tensors(content: dict[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value.data for name, value in content.items() if type(value) in TENSORS}


def _token(name: str) -> str:
    """Return the token that a file of diffusers has as its tensor's name; "" for the names that other forms use."""
    return "" if name in UNNAMED else name
