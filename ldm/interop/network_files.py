"""Read and write a network's folder: config.json, and weights, which are loaded strictly and written atomically."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import NonFiniteError
from ldm.files.atomic import atomic_file
from ldm.files.messages import describe_misfit
from ldm.files.strict_json import read_json, write_json
from ldm.interop.extra_tensors import extra_tensors, modules_of, warn_of_extras
from ldm.interop.identify import looks_like, shapes_of, without_wrapping
from ldm.interop.weight_reader import Weights, is_finite, open_weights

CODE_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines", "trust_remote_code", "_attn_implementation_internal")
MAX_LEVELS, MAX_LAYERS = 16, 32  # of a U-Net or autoencoder, which is built before its weights are compared
WEIGHTS_STEM, TEXT_STEM = "diffusion_pytorch_model", "model"  # diffusers', transformers'
OLD_TEXT_STEM = "pytorch_model"  # of transformers' pickles
MAX_SHARDS = 1000
RUN_MODEL = "model"  # folder in a run of ldm/train.py that holds its newest export


def model_folder(path: Path) -> Path:
    """Return the model's folder: a run of ldm/train.py keeps its newest model in its folder model/."""
    return path / RUN_MODEL if (path / RUN_MODEL / "model_index.json").exists() else path


def read_config(source: Path) -> dict[str, Any]:
    """Read a config.json. Raises ValueError for one with classes of its own: they are never run, and without them it is
    incomplete."""
    content = read_json(source)
    refuse_code(content, source=source)
    return content


def refuse_code(content: Mapping[str, Any], *, source: Path) -> None:
    if wanted := [key for key in CODE_KEYS if content.get(key)]:
        raise ValueError(f"{source} asks to run its own code ({wanted[0]}): refused; give a model that needs none")


def check_whole_numbers(content: Mapping[str, Any], limits: Mapping[str, int], *, source: Path) -> None:
    """Raise ValueError unless these values, or lists of values, are whole numbers from 1 to their limits.

    A key may be absent, or null. Networks are built from these numbers before their weights are seen.
    """
    for key, limit in limits.items():
        given = as_whole(content.get(key))
        values = given if isinstance(given, list) else [] if given is None else [given]
        if len(values) > MAX_LEVELS or any(type(value) is not int or not 1 <= value <= limit for value in values):
            raise ValueError(f"{source} has {key} {str(given)[:60]}, expected whole numbers from 1 to {limit}")


def as_whole(value: Any) -> Any:
    """Return a whole number as int, also within a list: other programs' JSON has 64.0 for 64."""
    if isinstance(value, list):
        return [as_whole(entry) for entry in value[: MAX_LEVELS + 1]]
    return int(value) if isinstance(value, float) and value.is_integer() else value


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


def find_weights(folder: Path, stem: str = WEIGHTS_STEM) -> Weights:
    """Open the weights of a folder in diffusers' or transformers' layout, preferring safetensors and full precision.

    Raises ValueError or FileNotFoundError, naming the file.
    """
    old_stem = OLD_TEXT_STEM if stem == TEXT_STEM else stem
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{old_stem}.bin", f"{old_stem}.fp16.bin"):
        index = folder / _index_name(name)
        if (folder / name).exists():
            return open_weights(folder / name)
        if index.exists():
            return open_weights(*_shards(index))
    raise FileNotFoundError(f"{folder / stem}.safetensors is missing: give the folder of a complete model")


def _index_name(name: str) -> str:
    """Return the index's name, with the variant where diffusers puts it: model.fp16.safetensors has
    model.safetensors.index.fp16.json."""
    stem, *variant, kind = name.split(".")
    return ".".join([stem, kind, "index", *variant, "json"])


def _shards(index: Path) -> list[Path]:
    """Read the file names of an index. Raises ValueError for a file outside its folder."""
    with described_by(index):
        named = read_json(index)["weight_map"].values()
        if not all(isinstance(name, str) for name in named):
            raise ValueError("its weight_map does not name files: copy it again")
        names = sorted(set(named))
        if not 1 <= len(names) <= MAX_SHARDS:
            raise ValueError(f"it names {len(names)} files, expected 1 to {MAX_SHARDS}")
        for name in names:
            if PurePosixPath(name).name != name or PureWindowsPath(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"it names a file elsewhere, {name!r}: refused; the files must be next to it")
    return [index.with_name(name) for name in names]


def write_network(network: nn.Module, config: Mapping[str, Any], folder: Path, *, dtype: torch.dtype) -> None:
    """Write config.json and the weights, as diffusers does."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(config, folder / "config.json")
    weights = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
    write_weights(weights, folder / f"{WEIGHTS_STEM}.safetensors")


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
    """Load tensors from files strictly, in this precision, with a warning of those that are ignored: see extra_tensors.

    Raises ValueError for a mismatch before reading them.
    """
    weights = without_extras(weights, network.state_dict())
    check_fit(network.state_dict(), weights.tensors, source=weights.source)
    network.load_state_dict(weights.read(dtype), strict=True, assign=True)


def without_extras(weights: Weights, wanted: Iterable[str]) -> Weights:
    """Remove the tensors that a network with these parameters does not have, if they change no picture, and warn."""
    weights, names = weights.changed(without_wrapping), set(wanted)
    extras = extra_tensors(weights.tensors, wanted=names, modules=modules_of(names))
    warn_of_extras(extras, weights.source)
    return weights.only(name for name in weights.tensors if name not in extras) if extras else weights


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
