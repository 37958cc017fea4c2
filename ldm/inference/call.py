"""What `pipe(...)` is called with, as requests: prompts, negative prompts and seeds may be lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from ldm.files.messages import did_you_mean
from ldm.inference.options import DrawOptions
from ldm.inference.parameter import parameters
from ldm.inference.request import DrawRequest

LISTED = ("prompt", "negative_prompt", "seed")
INTERNAL = ("place", "remarks")  # fields of DrawRequest that are not asked for
# Diffusers' names of arguments that are called otherwise here, in addition to those that the command line has.
THEIRS = {"num_images_per_prompt": "n", "generator": "seed", "mask_image": "mask", "callback_on_step_end": "callback"}


def requests_of_call(settings: Mapping[str, Any]) -> list[DrawRequest]:
    """Return one request for each prompt, negative prompt and seed: those that are lists have equal lengths, and those
    that are not count for all.

    Raises ValueError for lists of other lengths, and TypeError, which names the nearest, for an unknown setting.
    """
    check_names(settings)
    lists = {name: as_list(settings[name]) for name in LISTED if is_list(settings.get(name))}
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1 or 0 in lengths.values():
        told = ", ".join(f"{length} of {name}" for name, length in lengths.items())
        raise ValueError(f"the lists have different lengths or are empty ({told}): give one value for each picture")
    one = {name: value for name, value in settings.items() if name not in lists}
    number = next(iter(lengths.values()), 1)
    return [DrawRequest(**one, **{name: values[i] for name, values in lists.items()}) for i in range(number)]


def check_functions(**given: object) -> None:
    """Raise TypeError for what is neither None nor a function, before anything is drawn."""
    for name, function in given.items():
        if function is not None and not callable(function):
            raise TypeError(f"{name} is a {type(function).__name__}, expected a function")


def is_list(value: Any) -> bool:
    """Whether a value is several: a list, a tuple, a range, an array or a tensor of one dimension."""
    return (isinstance(value, Sequence) and not isinstance(value, (str, bytes))) or getattr(value, "ndim", 0) == 1


def as_list(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def check_names(settings: Mapping[str, Any]) -> None:
    """Raise TypeError for a name that is no field of DrawRequest; it says what the setting is called here."""
    known = {field.name for field in fields(DrawRequest) if field.name not in INTERNAL}
    for name in settings:
        if name in known:
            continue
        if name in {field.name for field in fields(DrawOptions)}:
            raise TypeError(f"{name} is one of the options: give options=DrawOptions({name}=...)")
        flags = {
            flag.lstrip("-").replace("-", "_"): field
            for field, about in parameters(DrawRequest).items()
            for flag in about.flags
        }
        meant = (flags | THEIRS).get(name) or did_you_mean(name, [*known, "n", "output_type", "progress", "callback"])
        hint = f"did you mean {meant}?" if meant else f"expected {', '.join(sorted(known))}"
        raise TypeError(f"there is no setting {name}, {hint}")
