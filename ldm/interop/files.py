"""Weight folders, config.json and one safetensors file: read strictly, in place only when written whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.whole import whole_file

SHOWN_KEYS = 5  # of a long list of wrong ones
RUN_MODEL = "model"  # folder of a run of ldm/train.py that holds its newest export


def model_folder(path: Path) -> Path:
    """Where the model lies: a run of ldm/train.py keeps its newest in its folder model/."""
    return path / RUN_MODEL if (path / RUN_MODEL / "model_index.json").exists() else path


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file, if it is missing or is no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing: give the folder of a whole model") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): give the folder of a whole model") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object: copy it again")
    return content


def refuse_other(content: dict[str, Any], known: dict[str, Any], *, source: Path) -> None:
    """Raise ValueError if a config sets one of these keys otherwise: its weights would load and compute wrongly.

    A key that is absent, or null, has the known value in the layouts that are read here.
    """
    for key, value in known.items():
        if content.get(key) not in (None, value):
            raise ValueError(f"{source} has {key} {content[key]!r}, expected {value!r}: this network is not supported")


@contextmanager
def described_by(source: Path) -> Iterator[None]:
    """Within it, what a config.json lacks or says in another form is a ValueError that names the file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{source} lacks the key {error.args[0]!r}: copy it again") from error
    except ValueError as error:
        raise error if str(source) in str(error) else ValueError(f"{source}: {error}") from error
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{source} holds a value of another kind than expected ({error}): copy it again") from error


def write_json(content: dict[str, Any], path: Path) -> None:
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises ValueError if it is missing, cut short or something else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        raise ValueError(f"{path} is missing: give the folder of a whole model")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): copy it again") from error


def write_weights(weights: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Contiguous float tensors; the metadata names the format, without which other readers refuse the file."""
    from safetensors.torch import save_file

    own = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with whole_file(path) as partial:
        save_file(own, partial, {"format": "pt"} | (metadata or {}))


def load_strictly(network: nn.Module, weights: dict[str, Tensor], *, source: Path) -> None:
    """Fill every parameter of a network (of meta tensors or real ones) and leave no tensor of the file unused.

    Raises ValueError that counts what is missing, unexpected or of another shape, and shows the first few.
    """
    wanted = network.state_dict()
    misshapen = sorted(k for k in wanted.keys() & weights.keys() if wanted[k].shape != weights[k].shape)
    faults = {
        "missing": sorted(wanted.keys() - weights.keys()),
        "unexpected": sorted(weights.keys() - wanted.keys()),
        "of another shape": misshapen,
    }
    told = [f"{len(keys)} {fault} ({', '.join(keys[:SHOWN_KEYS])})" for fault, keys in faults.items() if keys]
    if told:
        raise ValueError(f"{source} does not fit its config: {'; '.join(told)}: give the file that belongs to it")
    network.load_state_dict(weights, strict=True, assign=True)


def to_float32(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(torch.float32) for name, tensor in weights.items()}
