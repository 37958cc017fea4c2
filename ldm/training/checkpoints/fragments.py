"""A checkpoint's tensors, cut as the ranks held them, and put together for ranks that hold them otherwise.

Each rank writes what it owns of each parameter: a run of consecutive elements of the flattened tensor, for the weight,
for what its optimiser remembers of it, and for each average. So what N ranks wrote under one ZeRO stage is read by any
number under any other, bit for bit, and no file holds a pickle.
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

RANGES = "ranges"  # key of the metadata that tells which elements a file's tensors are


class Span(NamedTuple):
    """Elements start to stop - 1 of the flattened parameter called name."""

    name: str
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


def rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def write_fragments(path: Path, tensors: Mapping[str, Tensor], spans: Mapping[str, Span]) -> None:
    """Write one rank's tensors. Those that spans names are 1-D fragments; the others are whole."""
    from safetensors.torch import save_file

    ranges = {key: [span.start, span.stop] for key, span in spans.items()}
    save_file(dict(tensors), path, metadata={RANGES: json.dumps(ranges)})


class Fragments:
    """The tensors of all ranks' files in one folder. A context manager: the files are open while it lasts.

    Raises ValueError, naming the tensor, for what is not there, or not there as a whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._places: dict[str, list[tuple[int, int, Any]]] = {}  # key -> (start, stop, file), by start
        self._whole: dict[str, Any] = {}

    def __enter__(self) -> Fragments:
        from safetensors import safe_open

        for path in sorted(self.folder.glob("rank_*.safetensors")):
            file = self._stack.enter_context(safe_open(path, "pt"))
            ranges = json.loads((file.metadata() or {}).get(RANGES, "{}"))
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                if key in ranges:
                    self._places.setdefault(key, []).append((*ranges[key], file))
                else:
                    self._whole[key] = file
        for places in self._places.values():
            places.sort(key=lambda place: place[:2])
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._places, self._whole = {}, {}

    def keys(self) -> Iterator[str]:
        yield from self._places
        yield from self._whole

    def sizes(self, group: str) -> dict[str, int]:
        """The number of elements of each flattened tensor GROUP/NAME, by NAME."""
        return {
            key.removeprefix(group + "/"): places[-1][1]
            for key, places in self._places.items()
            if key.startswith(group + "/")
        }

    def whole(self, key: str) -> Tensor:
        """A tensor that one rank wrote as a whole."""
        if key not in self._whole:
            raise ValueError(f"it holds no {key}")
        return self._whole[key].get_tensor(key)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Elements start to stop - 1 of a flattened tensor, from whichever files hold them."""
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
        """One sha256 of all tensors, whoever wrote which part: equal for equal states of any number of ranks.

        The generators, of which every rank has its own, are left out.
        """
        found = hashlib.sha256()
        for key in sorted(key for key in self.keys() if not key.startswith("generators/")):
            places = self._places.get(key)
            tensor = self.whole(key) if places is None else self.read(key, 0, places[-1][1])
            found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()
