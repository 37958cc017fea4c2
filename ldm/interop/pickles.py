"""PyTorch's own files (.ckpt, .pt, .bin): pickles, of which only tensors and plain containers are let through.

A pickle can name any function of any library, to be called while it is read. Nothing that it names is ever called here:
torch.load(weights_only=True) knows the few that make tensors, some harmless names stand for nothing, and a file that
names another is refused. There is no other way of reading, and no option that allows one.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the second: torch's magic number, pickled
MAX_PICKLE_BYTES = 2**26  # without the numbers, which lie beside it; Stable Diffusion's has 1 or 2 MB


class Inert:
    """Stands for what old checkpoints name beside their weights. It takes whatever it is given, and does nothing."""

    def __new__(cls, *args: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# What Lightning wrote into the checkpoints of Stable Diffusion 1: its callback's class, and its numbers.
HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)


def is_pickle(path: Path) -> bool:
    """By the first bytes. A zip archive of something else is one too, and an error when it is opened."""
    with path.open("rb") as file:
        head = file.read(len(LEGACY))
    return head.startswith(ZIP) or head == LEGACY


def open_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors by name, mapped from the file where it is of the kind that torch writes since 2020.

    They may lie in an entry `state_dict`; what lies beside them (epoch, optimizer, ...) is left out. Raises ValueError
    for a file that names code, or that is no such file.
    """
    content = _load(path)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected named tensors: give the file of a model")
    if "string_to_param" in content:
        raise ValueError(f"{path} is a textual inversion (words for a model), which is not supported: give a model")
    return {name: value.data for name, value in content.items() if isinstance(name, str) and _is_tensor(value)}


def _is_tensor(value: object) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter)


def is_mapped(path: Path) -> bool:
    """Whether its tensors stay in the file until they are read; those of the older kind cannot."""
    with path.open("rb") as file:
        return file.read(len(ZIP)) == ZIP


def _check_archive(path: Path) -> None:
    """Refuse a zip archive that would grow when it is read: torch compresses nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole PyTorch checkpoint ({error}): copy it again") from error
    pickled = sum(member.file_size for member in members if member.filename.endswith(".pkl"))
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or pickled > MAX_PICKLE_BYTES:
        raise ValueError(
            f"{path} is a compressed archive, or has a pickle of {pickled} bytes: no checkpoint of torch's"
        )


def _load(path: Path) -> Any:
    if is_mapped(path):
        _check_archive(path)
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in HARMLESS]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped(path))
    except Exception as error:  # made-up bytes fail in any way that a parser can
        if named := re.search(r"GLOBAL ([\w.]+) (was not an allowed|whose module)", str(error)):
            raise ValueError(
                f"{path} asks to run {named[1]} while it is read: refused; give the same weights as safetensors"
            ) from error
        told = str(error).partition("WeightsUnpickler error:")[2] or str(error)  # torch's advice before it is not ours
        reason = " ".join(told.split())[:120] or type(error).__name__
        raise ValueError(f"{path} is not a whole PyTorch checkpoint ({reason}): copy it again") from error
