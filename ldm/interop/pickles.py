"""Read PyTorch's own files (.ckpt, .pt, .bin): pickles, of which only tensors and plain containers are accepted.

A pickle can name any function of any library, to be called while it is read. Here nothing that it names is ever called:
torch.load(weights_only=True) allows only those that build tensors, some harmless names map to an inert class, and a
file that names another is refused. No option allows another way of reading.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ZIP, LEGACY = b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # LEGACY: torch's magic number, pickled
TENSORS = (Tensor, torch.nn.Parameter)  # the types of what is read
# Entries under which trainers store a model next to their own state, in the order in which they are looked for; and
# under which they store its averaged weights.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "weights")
AVERAGES = ("ema", "ema_state_dict", "state_dict_ema", "model_ema", "params_ema", "ema_model", "shadow_params")
MAX_DEPTH = 3  # of a wrapper in a wrapper
MAX_PICKLE_BYTES = 2**26  # without the tensors' data, stored separately; Stable Diffusion's has 1 or 2 MB


class Inert:
    """Replacement for other classes named in old checkpoints. It accepts any arguments, and does nothing."""

    def __new__(cls, *args: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Names that Lightning wrote into the checkpoints of Stable Diffusion 1: its callback's class, and numpy scalars. Then
# the arguments of a training's command line, which DiT's and other programs keep with the weights.
HARMLESS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "argparse.Namespace",
    *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
)


def is_pickle(path: Path) -> bool:
    """Return whether the first bytes are those of a PyTorch file. Any zip archive passes; opening it then fails."""
    with path.open("rb") as file:
        head = file.read(len(LEGACY))
    return head.startswith(ZIP) or head == LEGACY


def open_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors by name; files in torch's format since 2020 are mapped into memory.

    They may be in an entry such as `state_dict`; other entries (epoch, optimizer, ...) are left out. If a model and its
    averages are in two entries, the averages of a complete model's denoiser get their names of CompVis's layout. Raises
    ValueError for a file that names code, or that is not such a file.
    """
    content = load_plain(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected named tensors: give the file of a model")
    if "string_to_param" in content:
        raise ValueError(f"{path} is a textual inversion, words for a model: give it with --embedding, and a model")
    found, averages = _model_in(content)
    named = _averages_named(averages)
    if averages and not named:
        warnings.warn(f"{path} also holds averaged weights, whose names are not read: they are ignored", stacklevel=2)
    return named | found


def _model_in(content: dict[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the model's tensors, out of the entries that it is wrapped in, and those of its averages."""
    averages: dict[str, Tensor] = {}
    for _ in range(MAX_DEPTH):
        inner = {name: content[name] for name in (*WRAPPERS, *AVERAGES) if isinstance(content.get(name), dict)}
        chosen = next((name for name in inner if len(inner[name]) > len(_tensors(content))), None)
        if chosen is None:
            break
        if chosen not in AVERAGES:
            averages = next((_tensors(inner[name]) for name in AVERAGES if name in inner), averages)
        content = inner[chosen]
    return _tensors(content), averages


def _tensors(content: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {name: value.data for name, value in content.items() if isinstance(name, str) and type(value) in TENSORS}


def _averages_named(averages: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the averages of a denoiser the names that CompVis's LitEma gives them: without dots, below model_ema."""
    prefix = "model."
    below = {name: tensor for name, tensor in averages.items() if name.startswith(f"{prefix}diffusion_model.")}
    return {"model_ema." + name.removeprefix(prefix).replace(".", ""): tensor for name, tensor in below.items()}


def is_mapped(path: Path) -> bool:
    """Return whether its tensors are mapped until they are read, which the older format does not allow."""
    with path.open("rb") as file:
        return file.read(len(ZIP)) == ZIP


def _check_archive(path: Path) -> None:
    """Raise ValueError for a zip archive that would expand on reading: torch does not compress."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a complete PyTorch checkpoint ({error}): copy it again") from error
    pickled = sum(member.file_size for member in members if member.filename.endswith(".pkl"))
    if any(member.compress_type != zipfile.ZIP_STORED for member in members) or pickled > MAX_PICKLE_BYTES:
        raise ValueError(
            f"{path} is a compressed archive, or has a pickle of {pickled} bytes: it is not a PyTorch checkpoint"
        )


def load_plain(path: Path) -> Any:
    """Read a file's content, tensors and plain containers. Raises ValueError for one that names code, or is damaged."""
    if is_mapped(path):
        _check_archive(path)
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in HARMLESS]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_mapped(path))
    except Exception as error:  # malformed bytes may raise any exception
        if named := re.search(r"GLOBAL ([\w.]+) (was not an allowed|whose module)", str(error)):
            raise ValueError(
                f"{path} asks to run {named[1]} while it is read: refused; give the same weights as safetensors"
            ) from error
        detail = str(error).partition("WeightsUnpickler error:")[2] or str(error)  # without torch's advice before it
        reason = " ".join(detail.split())[:120] or type(error).__name__
        raise ValueError(f"{path} is not a complete PyTorch checkpoint ({reason}): copy it again") from error
