"""Read config.json and load weights into networks, strictly; write weights atomically."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import NonFiniteError
from ldm.files.atomic import atomic_file
from ldm.files.messages import describe_misfit
from ldm.interop.identify import looks_like, shapes_of
from ldm.interop.weight_reader import Weights, is_finite

CODE_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "_attn_implementation_internal")
MAX_LEVELS, MAX_LAYERS = 16, 32  # of a U-Net or autoencoder, which is built before its weights are compared
RUN_MODEL = "model"  # folder in a run of ldm/train.py that holds its newest export


def model_folder(path: Path) -> Path:
    """Return the model's folder: a run of ldm/train.py keeps its newest model in its folder model/."""
    return path / RUN_MODEL if (path / RUN_MODEL / "model_index.json").exists() else path


def check_no_code(content: Mapping[str, Any], *, source: Path) -> None:
    """Raise ValueError for a config with classes of its own: they are never run, and without them it is incomplete."""
    if wanted := [key for key in CODE_KEYS if content.get(key)]:
        raise ValueError(f"{source} asks to run its own code ({wanted[0]}): refused; give a model that needs none")


def check_whole_numbers(content: Mapping[str, Any], limits: Mapping[str, int], *, source: Path) -> None:
    """Raise ValueError unless these values, or lists of values, are whole numbers from 1 to their limits.

    A key may be absent, or null. Networks are built from these numbers before their weights are seen.
    """
    for key, limit in limits.items():
        given = content.get(key)
        values = given if isinstance(given, list) else [] if given is None else [given]
        if len(values) > MAX_LEVELS or any(type(value) is not int or not 1 <= value <= limit for value in values):
            raise ValueError(f"{source} has {key} {str(given)[:60]}, expected whole numbers from 1 to {limit}")


@contextmanager
def described_by(source: Path) -> Iterator[None]:
    """Context manager: turn missing or malformed keys of a config.json into a ValueError that names the file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{source} lacks the key {str(error.args[0])[:80]!r}: copy it again") from error
    except ValueError as error:
        raise error if str(source) in str(error) else ValueError(f"{source}: {error}") from error
    except (TypeError, AttributeError, ArithmeticError, LookupError, RuntimeError) as error:
        raise ValueError(f"{source} holds a value of another kind than expected ({error}): copy it again") from error


def write_weights(weights: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write contiguous float tensors. The metadata names the format, without which other readers refuse the file.

    Raises NonFiniteError, naming the tensor, if one is not finite: otherwise it would only be noticed on reading.
    """
    from safetensors.torch import save_file

    own = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    for name, tensor in own.items():
        if not is_finite(tensor):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise NonFiniteError(f"{name} contains NaN, or exceeds the range of {kind}: nothing is written to {path}")
    with atomic_file(path) as partial:
        save_file(own, partial, {"format": "pt"} | (metadata or {}))


def load_strictly(network: nn.Module, weights: Mapping[str, Tensor], *, source: Path) -> None:
    """Assign these tensors to the network's parameters (which may be meta tensors), and use all of them.

    Raises ValueError with the number of missing, unexpected and misshapen tensors, and the first few names.
    """
    check_fit(network.state_dict(), weights, source=source)
    network.load_state_dict(dict(weights), strict=True, assign=True)


def fill(network: nn.Module, weights: Weights, *, dtype: torch.dtype) -> None:
    """Load tensors from files strictly, in this precision. Raises ValueError for a mismatch before reading them."""
    check_fit(network.state_dict(), weights.tensors, source=weights.source)
    network.load_state_dict(weights.read(dtype), strict=True, assign=True)


def check_fit(
    wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], *, source: Path, to: str = "its config"
) -> None:
    """Raise ValueError unless both have the same names with the same shapes."""
    shapes = shapes_of(found)
    misfit = describe_misfit(shapes_of(wanted), shapes)
    if misfit:
        foreign = looks_like(shapes)
        hint = f"this looks like {foreign.name}, {foreign.remedy}" if foreign else "give the file that belongs to it"
        raise ValueError(f"{source} does not fit {to}: {misfit}: {hint}")
