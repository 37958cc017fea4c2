"""Read files of named tensors, safetensors or PyTorch's pickles, distinguished by their first bytes, not their name.

The files are mapped into memory, and read only when values are needed: 4 GB of weights open in a moment.
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
from ldm.interop.safetensors_tail import tensors_before_tail

FLOATS = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
EIGHT_BITS = {torch.float8_e4m3fn: "fp8 (e4m3)", torch.float8_e5m2: "fp8 (e5m2)"}  # of which networks are read as well
GROUP_BYTES = 2**29  # of a file that are in memory in addition to their converted copies
MAX_HEADER_BYTES = 100 * 10**6  # of a safetensors file, as in the library
MAX_TENSORS = 100_000
MAX_NAME = 300  # characters
SUFFIXES_WITHOUT_CODE = (".safetensors", ".sft")

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Weights:
    """Tensors stored in files. An invalid tensor raises a ValueError that names the file and the tensor."""

    files: tuple[Path, ...]
    tensors: dict[str, Tensor]  # mapped: values are read on access; names, shapes and precisions need no reading
    # Maps the files again: pages that were read through a mapping stay in memory until the mapping is released.
    remap: Callable[[], dict[str, Tensor]]
    metadata: Mapping[str, str]  # only of a safetensors file

    @property
    def source(self) -> Path:
        """The path to name in errors: the file, or the folder of several files."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent

    def changed(self, change: Change) -> Weights:
        """Return the weights under other names, or in other views: `change` must not compute."""
        return replace(self, tensors=change(self.tensors), remap=lambda: change(self.remap()))

    def only(self, names: Iterable[str]) -> Weights:
        """Return only these tensors. Raises KeyError for a missing one."""
        chosen = list(names)
        return self.changed(lambda tensors: {name: tensors[name] for name in chosen})

    def read(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Read all tensors in this precision, and check that they are finite.

        Tensors already in this precision stay mapped; of the others, at most GROUP_BYTES of the file are in memory in
        addition to the result.
        """
        same = [name for name, tensor in self.tensors.items() if tensor.dtype == dtype]
        found = {name: _converted(name, self.tensors[name], dtype, self.source) for name in same}
        for names in _groups({name: tensor for name, tensor in self.tensors.items() if tensor.dtype != dtype}):
            mapped = self.remap()
            found |= {name: _converted(name, mapped[name], dtype, self.source) for name in names}
        return found


def open_weights(*files: Path) -> Weights:
    """Open the tensors of a file, or of all files of a sharded network.

    Raises ValueError, of one line, unless all are complete files of plain tensors, and FileNotFoundError for a missing
    one.
    """
    kinds = [_kind(file) for file in files]

    def opened() -> tuple[dict[str, Tensor], dict[str, str]]:
        found: dict[str, Tensor] = {}
        headers: list[dict[str, str]] = []
        for file, kind in zip(files, kinds, strict=True):
            tensors, metadata = (open_pickle(file), {}) if kind == "pickle" else _open_safetensors(file)
            if twice := found.keys() & tensors.keys():
                raise ValueError(f"{file} contains {min(twice)} a second time: give the files of one model")
            _check_plain(tensors, file)
            found |= tensors
            headers.append(metadata)
        return found, headers[0]

    tensors, metadata = opened()
    stay = all(kind == "safetensors" or is_mapped(file) for file, kind in zip(files, kinds, strict=True))
    return Weights(files, tensors, (lambda: opened()[0]) if stay else (lambda: tensors), metadata)


def describe(tensors: Mapping[str, Tensor]) -> str:
    """Describe the precision and the number of tensors: "fp16, 1131 tensors"."""
    known = FLOATS | EIGHT_BITS
    kinds = sorted({known.get(tensor.dtype, str(tensor.dtype).removeprefix("torch.")) for tensor in tensors.values()})
    return f"{' and '.join(kinds)}, {len(tensors)} tensors"


def _kind(path: Path) -> Literal["safetensors", "pickle"]:
    """Determine the format from the first bytes."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: give the file or the folder of a complete model")
    if not path.is_file():
        raise ValueError(f"{path} is not a plain file, expected one with weights")
    if _is_safetensors(path):
        return "safetensors"
    if not is_pickle(path):
        raise ValueError(f"{path} does not contain weights: {_what_it_is(path)}")
    if path.suffix in SUFFIXES_WITHOUT_CODE:
        raise ValueError(
            f"{path} is a pickle with the suffix of a safetensors file, which may be meant to deceive: rename it to "
            ".ckpt if you trust it"
        )
    return "pickle"


def _is_safetensors(path: Path) -> bool:
    """Return whether the file starts with eight bytes for the header's length, and a header in JSON."""
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
        return "it is a pointer of git-lfs, not the file itself: run git lfs pull"
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "it is a web page, probably from a download that needs a login: download it again"
    if head.startswith(b"GGUF"):
        return "it is a GGUF file, whose quantised weights are not supported: give safetensors"
    return "it is neither a safetensors file nor a PyTorch checkpoint, or it is truncated: copy it again"


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return its tensors and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        if (found := tensors_before_tail(path)) is not None:
            return found
        raise ValueError(f"{path} is not a complete safetensors file ({error}): copy it again") from error


def _check_plain(tensors: Mapping[str, Tensor], source: Path) -> None:
    """Raise ValueError for anything but plain tensors: a file of a kilobyte may claim a tensor of many gigabytes."""
    if (count := len(tensors)) > MAX_TENSORS:
        raise ValueError(f"{source} contains {count} tensors, expected at most {MAX_TENSORS}: this is not a model")
    for name, tensor in tensors.items():
        if len(name) > MAX_NAME or not name.isprintable():
            raise ValueError(f"{source} has a tensor with the invalid name {name[:40]!r}: this is not a model")
        if tensor.ndim > 1 and tensor.numel() == 0:  # its other dimensions could be huge without any data
            raise ValueError(f"{source}: tensor {name} has shape {tuple(tensor.shape)}, expected no empty dimension")
        plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
        if not plain or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
            raise ValueError(
                f"{source}: tensor {name} of shape {tuple(tensor.shape)} is sparse, quantised, or larger than its "
                "stored data: give a file of plain tensors"
            )


def _converted(name: str, tensor: Tensor, dtype: torch.dtype, source: Path) -> Tensor:
    """Convert a tensor to this precision. Raises ValueError if a value is not finite."""
    if tensor.dtype not in (known := FLOATS | EIGHT_BITS):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{source}: tensor {name} holds {kind}, expected {', '.join(known.values())}: convert it")
    found = tensor.to(dtype)
    # Check the wider of the two: its sums are fast, and overflow in the narrower is not the file's fault.
    if not is_finite(found if found.element_size() > tensor.element_size() else tensor):
        raise ValueError(f"{source}: tensor {name} holds NaN or infinity: this file is damaged, get it again")
    return found


def is_finite(tensor: Tensor) -> bool:
    """Return whether all values of a float tensor are finite."""
    # A sum takes a quarter of the time of minimum and maximum, but a sum of finite values may overflow.
    return math.isfinite(tensor.sum().item()) or tensor.numel() == 0 or all(end.isfinite() for end in tensor.aminmax())


def _groups(tensors: Mapping[str, Tensor]) -> Iterator[Sequence[str]]:
    """Group all names by GROUP_BYTES of their tensors."""
    group, size = [], 0
    for name, tensor in tensors.items():
        group.append(name)
        size += tensor.numel() * tensor.element_size()
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
