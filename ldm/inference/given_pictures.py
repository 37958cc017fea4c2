"""Pictures as Python programs have them (paths, arrays, tensors), as Pillow's. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.inference.pictures import read_picture

if TYPE_CHECKING:
    from PIL import Image

CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's mode of an array with as many
EXPECTED = "a PIL image, a path, a NumPy array or a PyTorch tensor"


def given_picture(name: str, given: Any) -> Image.Image:
    """Return a picture, whatever it was given as.

    given: a PIL image; the path of a file; an array H x W or H x W x C; a tensor H x W or C x H x W. C is 1 (grey), 3
    (RGB) or 4 (with transparency), and may follow or precede a batch dimension of 1. Integers are uint8, from 0 to 255;
    floats are from 0 to 1, as in diffusers; booleans are black and white. Raises TypeError or ValueError, naming the
    picture, for anything else.
    """
    from PIL import Image

    if isinstance(given, Image.Image):
        return given
    if isinstance(given, (str, Path)):
        return read_picture(Path(given).expanduser())
    if hasattr(given, "detach") and hasattr(given, "cpu"):
        values = given.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
        return _from_array(name, values, channels_first=True)
    if hasattr(given, "__array_interface__"):
        import numpy

        return _from_array(name, numpy.asarray(given), channels_first=False)
    raise TypeError(f"{name} is a {type(given).__name__}, expected {EXPECTED}")


def _from_array(name: str, values: Any, *, channels_first: bool) -> Image.Image:
    from PIL import Image

    shape = tuple(values.shape)
    if len(shape) == 4 and shape[0] == 1:
        values = values[0]
    if channels_first and values.ndim == 3:
        values = values.transpose(1, 2, 0)
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in CHANNELS) or 0 in values.shape:
        order = "C x H x W" if channels_first else "H x W x C"
        raise ValueError(f"{name} has the shape {shape}, expected one picture: H x W, or {order} with C 1, 3 or 4")
    mode = "L" if values.ndim == 2 else CHANNELS[values.shape[2]]
    height, width = values.shape[:2]
    return Image.frombytes(mode, (width, height), _eight_bits(name, values).tobytes())


def _eight_bits(name: str, values: Any) -> Any:
    """Convert booleans, uint8, or floats from 0 to 1 to uint8."""
    if values.dtype == "uint8":
        return values
    if values.dtype == bool:
        return values.astype("uint8") * 255
    if values.dtype.kind != "f":
        raise TypeError(f"{name} has elements of type {values.dtype}, expected uint8, bool or floats from 0 to 1")
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 1:  # also if one is NaN
        raise ValueError(f"{name} has values from {low:g} to {high:g}, expected floats from 0 to 1, or uint8")
    return (values * 255).round().astype("uint8")
