"""Write a checkpoint's tensors as fragments, one file per rank, and read them back for any other partition.

Each rank writes what it owns of each parameter: consecutive elements of the flattened tensor, for the weight, its
optimiser state and each average. So a checkpoint of N ranks under one ZeRO stage can be read by any number of ranks
under any other, bit for bit, and no file holds a pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.files.writing import writing

RANGES = "ranges"  # metadata key: which elements each tensor of a file holds


class Span(NamedTuple):
    """Elements start to stop - 1 of the flattened parameter `name`."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def write_fragments(path: Path, tensors: Mapping[str, Tensor], spans: Mapping[str, Span]) -> None:
    """Write one rank's tensors. Those listed in spans are 1-D fragments; the others are unsharded."""
    from safetensors.torch import save_file

    ranges = {key: [span.start, span.stop] for key, span in spans.items()}
    with writing(path):
        save_file(dict(tensors), path, metadata={RANGES: json.dumps(ranges)})


class Fragments:
    """Reader of the tensors in all ranks' files of one folder. A context manager: it keeps the files open.

    Its methods raise ValueError, naming the tensor, if a tensor or some of its elements are missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._places: dict[str, list[tuple[int, int, Any]]] = {}  # key -> (start, stop, file), by start
        self._unsharded: dict[str, Any] = {}

    def __enter__(self) -> Fragments:
        from safetensors import safe_open

        for path in sorted(self.folder.glob("rank_*.safetensors")):
            file = self._stack.enter_context(safe_open(path, "pt"))
            ranges = json.loads((file.metadata() or {}).get(RANGES, "{}"))
            for key in file.keys():  # noqa: SIM118 - not a dictionary
                if key in ranges:
                    self._places.setdefault(key, []).append((*ranges[key], file))
                else:
                    self._unsharded[key] = file
        for places in self._places.values():
            places.sort(key=lambda place: place[:2])
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._places, self._unsharded = {}, {}

    def keys(self) -> Iterator[str]:
        yield from self._places
        yield from self._unsharded

    def sizes(self, group: str) -> dict[str, int]:
        """Map NAME to the number of elements of each flattened tensor GROUP/NAME."""
        own = group + "/"
        return {key.removeprefix(own): places[-1][1] for key, places in self._places.items() if key.startswith(own)}

    def whole(self, key: str) -> Tensor:
        """Read a tensor that one rank wrote unsharded."""
        if key not in self._unsharded:
            raise ValueError(f"it holds no {key}")
        return self._unsharded[key].get_tensor(key)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Read elements start to stop - 1 of a flattened tensor, from all files that hold them."""
        parts, reached = [], start
        for first, end, file in self._places.get(key, ()):
            if first > reached or reached >= stop:
                break
            if end > reached:
                until = min(end, stop)
                parts.append(file.get_slice(key)[reached - first : until - first])
                reached = until
        if reached < stop:
            raise ValueError(f"it holds no elements {reached} to {stop - 1} of {key}")
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty(0)

    def digest(self) -> str:
        """Hash all tensors with SHA-256: equal states have equal digests, for any number of ranks.

        The random generators are left out, since each rank has its own.
        """
        found = hashlib.sha256()
        for key in sorted(key for key in self.keys() if not key.startswith("generators/")):
            places = self._places.get(key)
            tensor = self.whole(key) if places is None else self.read(key, 0, places[-1][1])
            found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()
