"""Settings stored alongside the weights of a single file: in its header, or in a NAME.yaml next to NAME.safetensors.

Such a YAML is CompVis's configuration of the complete model. It names Python classes to be built; these names are
ignored here, and a few numbers are read. (ldm.config reads the YAML of our own runs.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ldm.denoisers import UNetConfig
from ldm.diffusion import Prediction
from ldm.files.atomic import write_atomically

OWN_KEY = "foundry"  # in the header of our files: JSON with the config.json of each part
HIDDEN_KEY = "foundry_hidden"  # in the text encoder's: the layer after which its states are taken
MAX_BYTES = 2**20
_NUMBERS = {"linear_start": float, "linear_end": float, "timesteps": int, "scale_factor": float}
PREDICTIONS: dict[str, Prediction] = {
    "eps": "eps", "epsilon": "eps", "v": "v", "v_prediction": "v", "velocity": "v", "x0": "x0", "sample": "x0",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """The settings found in the header or in the YAML. None: not stated."""

    own: dict[str, Any] | None = None  # part -> the content of its config.json
    prediction: Prediction | None = None
    linear_start: float = 0.00085
    linear_end: float = 0.0120
    timesteps: int = 1000
    scale_factor: float | None = None
    heads: int | None = None
    head_width: int | None = None
    resolution: int | None = None  # pixels per side
    clip_skip: int | None = None  # the layer of the text encoder, counted from its end

    def __post_init__(self) -> None:
        numbers = (self.linear_start, self.linear_end, 1 if self.scale_factor is None else self.scale_factor)
        if not all(0 < number < 1000 for number in numbers) or not 2 <= self.timesteps <= 10_000:
            raise ValueError(f"its schedule or scale is out of range ({numbers}, {self.timesteps} steps)")
        if not all(1 <= number <= 1024 for number in (self.heads or 1, self.head_width or 1)):
            raise ValueError(f"it has {self.heads or self.head_width} attention heads or channels per head")


def read_sidecar(file: Path, metadata: Mapping[str, str]) -> Sidecar:
    """Read the header of a single file and the YAML next to it. Raises ValueError if either is damaged."""
    if OWN_KEY in metadata:
        try:
            own = json.loads(metadata[OWN_KEY])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: its header's {OWN_KEY} is not JSON: copy it again") from error
        if not isinstance(own, dict) or not all(isinstance(part, dict) for part in own.values()):
            raise ValueError(f"{file}: its header's {OWN_KEY} does not describe the parts of a model: copy it again")
        return Sidecar(own=own)
    spec: dict[str, Any] = {
        "prediction": PREDICTIONS.get(metadata.get("modelspec.prediction_type", "").lower()),
        "resolution": _resolution(metadata.get("modelspec.resolution", "")),
        "clip_skip": _small_number(metadata.get("modelspec.encoder_layer", "")),
    }
    yaml_path = file.with_suffix(".yaml")
    if not yaml_path.is_file():
        return Sidecar(**spec)
    try:
        return Sidecar(**(spec | _read_yaml(yaml_path, spec["prediction"])))
    except ValueError as error:
        raise ValueError(f"{yaml_path}: {error}: repair or remove it") from error


def _resolution(text: str) -> int | None:
    side = _small_number(text.partition("x")[0])
    return side if side is not None and side <= 4096 else None


def _small_number(text: str) -> int | None:
    digits = text.strip()
    return int(digits) if len(digits) < 6 and digits.isdecimal() and int(digits) >= 1 else None


def _read_yaml(path: Path, default: Prediction | None) -> dict[str, Any]:
    """Read the settings of a YAML. default: the prediction if the YAML does not state one."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {MAX_BYTES}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"it is not YAML ({' '.join(str(error).split())[:100]})") from error
    try:
        params = tree["model"]["params"]
        unet = params["unet_config"]["params"]
        numbers = {name: kind(params[name]) for name, kind in _NUMBERS.items() if name in params}
        heads, head_width = int(unet.get("num_heads", -1)), int(unet.get("num_head_channels", -1))
        parameterization = params.get("parameterization", default or "eps")  # as in CompVis's code
        if not isinstance(parameterization, str):  # aliases may make a list that no memory can print
            raise TypeError("its parameterization is not a string")
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"it is not a configuration of Stable Diffusion ({str(error)[:80]!r})") from error
    if parameterization not in PREDICTIONS:
        raise ValueError(f"its parameterization is {parameterization[:40]!r}, expected eps, v or x0")
    found = {"prediction": PREDICTIONS[parameterization], "heads": heads, "head_width": head_width}
    return numbers | {name: value for name, value in found.items() if value != -1}


def with_heads(config: UNetConfig, sidecar: Sidecar) -> UNetConfig:
    """Set the stated number of attention heads. Raises ValueError if it does not divide the widths."""
    if sidecar.head_width:
        heads = tuple(max(1, width // sidecar.head_width) for width in config.block_out_channels)
        return replace(config, heads=heads)
    return replace(config, heads=sidecar.heads) if sidecar.heads else config


def write_yaml(tree: dict[str, Any], path: Path) -> None:
    write_atomically(path, yaml.safe_dump(tree, sort_keys=False).encode())
