"""Read a safetensors file that has further bytes after its last tensor, which the library refuses.

Copying and uploading programs leave such bytes. The header has the position of each tensor, so nothing is in doubt:
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_TAIL = 2**16  # bytes; a larger rest is more than an accident
MAX_HEADER_BYTES = 100 * 10**6
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
Header = dict[str, Any]


def tensors_before_tail(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Return the tensors, mapped, and the metadata of a file that is sound but for a tail, and warn of it.

    None for any other file: one that is damaged has a header that does not account for each byte before the tail.
    """
    try:
        header, start = _read_header(path)
        metadata = header.pop("__metadata__", None) or {}
        end = _checked_end(header, metadata)
    except (ValueError, TypeError, KeyError, LookupError, OSError, RecursionError, AttributeError):
        return None
    tail = path.stat().st_size - start - end
    if not 0 < tail <= MAX_TAIL or not header:
        return None
    warnings.warn(f"{path} has {tail} bytes after its last tensor, which are ignored", stacklevel=2)
    mapped = torch.from_file(str(path), shared=False, size=start + end, dtype=torch.uint8)[start:]
    return {name: _view(mapped, start, entry) for name, entry in header.items()}, metadata


def _read_header(path: Path) -> tuple[Header, int]:
    """Return the header, and the position of the first tensor."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= MAX_HEADER_BYTES:
            raise ValueError("the header's length is out of range")
        header = json.loads(file.read(length))
    if type(header) is not dict:
        raise ValueError("the header is no object")
    return header, 8 + length


def _checked_end(header: Header, metadata: Header) -> int:
    """Return the number of bytes of all tensors. Raises ValueError, KeyError or TypeError unless they lie one after the
    other, each as long as its shape."""
    if not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("the metadata is no text")
    end = 0
    for entry in sorted(header.values(), key=lambda entry: tuple(entry["data_offsets"])):
        shape, (begin, stop) = entry["shape"], entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, stop)):
            raise ValueError("a shape or an offset is no whole number")
        if begin != end or stop - begin != math.prod(shape) * _DTYPES[entry["dtype"]].itemsize:
            raise ValueError("the tensors do not lie one after the other")
        end = stop
    return end


def _view(mapped: Tensor, start: int, entry: Header) -> Tensor:
    begin, stop = entry["data_offsets"]
    dtype, data = _DTYPES[entry["dtype"]], mapped[begin:stop]
    if (start + begin) % dtype.itemsize:  # other types begin at multiples of their size
        data = data.clone()
    return data.view(dtype).view(entry["shape"])
