"""Files of named tensors, told apart by their first bytes, whatever they are called: safetensors and PyTorch's pickles.

They are mapped into memory and not read until a number is asked for: 4 GB of weights are opened in a moment.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ldm.interop.pickles import is_mapped, is_pickle, open_pickle

FLOATS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
GROUP_BYTES = 2**29  # of a file that lie in memory beside what they are turned into
MAX_HEADER_BYTES = 100 * 10**6  # of a safetensors file, as in the library
MAX_TENSORS = 100_000
MAX_NAME = 300  # characters
SUFFIXES_WITHOUT_CODE = (".safetensors", ".sft")

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Weights:
    """Tensors that lie in files. What is wrong with one is a ValueError that names the file and the tensor."""

    files: tuple[Path, ...]
    tensors: dict[str, Tensor]  # mapped: names, shapes and precisions cost nothing, numbers come when they are asked
    # Maps the files anew: what has been read through a mapping stays in memory until the mapping is let go.
    remap: Callable[[], dict[str, Tensor]]
    metadata: Mapping[str, str]  # of a safetensors file alone

    @property
    def source(self) -> Path:
        """What an error names: the file, or the folder of several."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent

    def changed(self, change: Change) -> Weights:
        """The same weights under other names, or in other views: change must not compute."""
        return replace(self, tensors=change(self.tensors), remap=lambda: change(self.remap()))

    def only(self, names: Iterable[str]) -> Weights:
        """Some of them. Raises KeyError for one that is not there."""
        chosen = list(names)
        return self.changed(lambda tensors: {name: tensors[name] for name in chosen})

    def read(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All tensors in this precision, each of them finite.

        Those that have it already stay where they are, in the file; of the others no more than GROUP_BYTES of the file
        are in memory beside the result.
        """
        found = {
            name: _converted(name, tensor, dtype, self.source)
            for name, tensor in self.tensors.items()
            if tensor.dtype == dtype
        }
        for names in _groups({name: tensor for name, tensor in self.tensors.items() if tensor.dtype != dtype}):
            mapped = self.remap()
            found |= {name: _converted(name, mapped[name], dtype, self.source) for name in names}
        return found


def open_weights(*files: Path) -> Weights:
    """The tensors of a file, or of all the files that one network was split into.

    Raises ValueError, one line, for whatever is no whole file of plain tensors; FileNotFoundError if one is not there.
    """
    kinds = [_kind(file) for file in files]

    def opened() -> tuple[dict[str, Tensor], dict[str, str]]:
        found: dict[str, Tensor] = {}
        told: list[dict[str, str]] = []
        for file, kind in zip(files, kinds, strict=True):
            tensors, metadata = (open_pickle(file), {}) if kind == "pickle" else _open_safetensors(file)
            if twice := found.keys() & tensors.keys():
                raise ValueError(f"{file} holds {min(twice)} a second time: give the files of one model")
            _check_plain(tensors, file)
            found |= tensors
            told.append(metadata)
        return found, told[0]

    tensors, metadata = opened()
    stay = all(kind == "safetensors" or is_mapped(file) for file, kind in zip(files, kinds, strict=True))
    return Weights(files, tensors, (lambda: opened()[0]) if stay else (lambda: tensors), metadata)


def describe(tensors: Mapping[str, Tensor]) -> str:
    """The precision and the number of tensors: "fp16, 1131 tensors"."""
    kinds = sorted({FLOATS.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")) for tensor in tensors.values()})
    return f"{' and '.join(kinds)}, {len(tensors)} tensors"


def _kind(path: Path) -> Literal["safetensors", "pickle"]:
    """What it is, by its first bytes."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: give the file or the folder of a whole model")
    if not path.is_file():
        raise ValueError(f"{path} is not a plain file, expected one that holds weights")
    if _is_safetensors(path):
        return "safetensors"
    if not is_pickle(path):
        raise ValueError(f"{path} holds no weights: {_what_it_is(path)}")
    if path.suffix in SUFFIXES_WITHOUT_CODE:
        raise ValueError(
            f"{path} is a pickle under the name of a safetensors file: whoever made it may have meant to deceive; "
            "name it .ckpt if you trust it"
        )
    return "pickle"


def _is_safetensors(path: Path) -> bool:
    """Eight bytes that say how long the header is, and a header in JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    return len(head) == 9 and head[8:] == b"{" and length <= min(path.stat().st_size, MAX_HEADER_BYTES)


def _what_it_is(path: Path) -> str:
    with path.open("rb") as file:
        head = file.read(512)
    if not head:
        return "it is empty: copy it again"
    if head.startswith(b"version https://git-lfs"):
        return "it is the pointer that git leaves where git-lfs is not installed: run git lfs pull"
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "it is a web page, probably of a download that needs a login: download it again"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file, whose quantised weights are not supported: give safetensors"
    return "it is neither a safetensors file nor a PyTorch checkpoint, or was cut short: copy it again"


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Its tensors, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy it again") from error


def _check_plain(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Refuse what is not simply numbers in memory: a file of a kilobyte may claim a tensor of many gigabytes."""
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{source} holds {len(tensors)} tensors, expected at most {MAX_TENSORS}: this is no model")
    for name, tensor in tensors.items():
        if len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(f"{source} has a tensor called {name[:40]!r}, which is no name: this is no model")
        if tensor.ndim > 1 and tensor.numel() == 0:  # its other sides would be free, and cost no byte
            raise ValueError(f"{source}: tensor {name} has shape {tuple(tensor.shape)}, expected numbers in it")
        plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(
                f"{source}: tensor {name} of shape {tuple(tensor.shape)} is sparse, quantised, or larger than what is "
                "stored of it: give a file of plain tensors"
            )


def _converted(name: str, tensor: Tensor, dtype: torch.dtype, source: Path) -> Tensor:
    """The tensor in this precision; ValueError if a number of it is not finite."""
    if tensor.dtype not in FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{source}: tensor {name} holds {kind}, expected {', '.join(FLOATS.values())}: convert it")
    found = tensor.to(dtype)
    # The wider of the two: sums are quick there, and what overflows in the narrower is not the file's fault.
    if not is_finite(found if found.element_size() > tensor.element_size() else tensor):
        raise ValueError(f"{source}: tensor {name} holds NaN or infinity: this file is damaged, get it again")
    return found


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a float tensor are."""
    # A sum takes a quarter of the time that the least and the largest take; but that of finite numbers may overflow.
    return math.isfinite(tensor.sum().item()) or tensor.numel() == 0 or all(end.isfinite() for end in tensor.aminmax())


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[Sequence[str]]:
    """All names, in groups of so many bytes."""
    group, size = [], 0
    for name, tensor in tensors.items():
        group.append(name)
        size += tensor.numel() * tensor.element_size()
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
