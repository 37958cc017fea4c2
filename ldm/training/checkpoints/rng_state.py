"""RNG states of this process as tensors, for checkpoints. Training itself draws only from (seed, position); dropout and
libraries use these generators."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def seed_generators(seed: int) -> None:
    """Seed all generators: Python's and NumPy's would otherwise start differently in each process."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def generator_states() -> dict[str, Tensor]:
    """Read the states of torch, Python and NumPy, and of torch on this process's GPU."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    numpy_state = [str(kind), np.asarray(keys).tolist(), *rest]
    states = {"cpu": torch.get_rng_state(), "python": _bytes(random.getstate()), "numpy": _bytes(numpy_state)}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def restore_generators(states: Mapping[str, Tensor]) -> None:
    """Restore each generator whose state is given."""
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
