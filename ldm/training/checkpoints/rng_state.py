"""The random generators of this process as tensors, for checkpoints: nothing in training draws from them that is not
a function of the seed and the position, but what a network does (dropout) or a library may."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int) -> None:
    """Start all of them from one seed: Python's and NumPy's would start from something else in each process."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def generator_states() -> dict[str, Tensor]:
    """torch's, Python's and NumPy's, and torch's of this process's GPU."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    numpy_state = [str(kind), np.asarray(keys).tolist(), *rest]
    states = {"cpu": torch.get_rng_state(), "python": _bytes(random.getstate()), "numpy": _bytes(numpy_state)}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_generators(states: Mapping[str, Tensor]) -> None:
    """Go on with each generator that there is a state of."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "python" in states:
        version, numbers, gauss = _value(states["python"])
        random.setstate((version, tuple(numbers), gauss))
    if "numpy" in states:
        kind, keys, *rest = _value(states["numpy"])
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


def _bytes(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)


def _value(tensor: Tensor) -> list:
    return json.loads(tensor.numpy().tobytes())
