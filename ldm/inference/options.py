"""The less common settings of a drawing. Does not import torch, so that --help is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ldm.files.messages import unknown_name
from ldm.files.paths import user_path
from ldm.inference.parameter import Range, check_is_text, check_number, check_ranges, keys_of, parameter

WEIGHTINGS = ("none", "a1111")  # of words in a prompt
FORMATS = ("diffusers", "single-file")  # of exports
SCHEDULES = ("constant", "linear", "cosine")  # of guidance's scale over time
FINER = "finer options"
BEGINNING = "starting from a picture"
TRANSPARENCIES = ("white", "mask")  # what transparent parts of the picture to start from become
MAX_EDGE = 256  # pixels
MAX_LORA_STRENGTH = 100
MAX_CLIP_SKIP = 256  # more layers than any text encoder has


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """Options of sampler, guidance and prompt. The defaults are the plain sampler and classifier-free guidance.

    Raises ValueError, naming the value, for anything out of range. DrawRequest.check checks what depends on the model.
    """

    eta: float | None = parameter(
        None, "fraction of fresh noise in ddim, dpmpp_sde, dpm_fast, dpm_adaptive and the ancestral samplers, 0 to 1 "
        "(default: 0 in ddim, else 1)",
        kind=float, flags=("--eta", "--ddim-eta"), metavar="X", group=FINER, within=Range(low=0, high=1), a1111="Eta",
    )  # fmt: skip
    time_grid: str | None = parameter(
        None, "times of the steps: one of {names}, or A1111's name of one, such as 'SGM Uniform', or the times "
        "themselves, decreasing from 1 (noise) to 0, such as 1,0.6,0.3,0 (default: trailing, or karras for models on "
        "EDM's path)",
        names=keys_of("TIME_GRIDS", "samplers/time_grids.py"),
        flags=("--time-grid", "--schedule-type"), metavar="NAME", group=FINER, a1111="Schedule type",
    )  # fmt: skip
    guidance_interval: tuple[float, float] = parameter(
        (0.0, 1.0), "times at which guidance is used, from 0, the picture, to 1, the noise (default: 0 1)", kind=float,
        flags=("--guidance-interval",), metavar=("START", "STOP"), group=FINER,
    )  # fmt: skip
    guidance_schedule: str = parameter(
        "constant", "how the scale changes from noise to picture: {names} (default: {default})",
        names=", ".join(SCHEDULES), flags=("--guidance-schedule",), metavar="NAME", group=FINER,
    )  # fmt: skip
    guidance_rescale: float = parameter(
        0.0, "reduces brightness at large scales, 0 to 1; 0.7 is common (default: 0)", kind=float,
        flags=("--guidance-rescale",), metavar="X", group=FINER, within=Range(low=0, high=1),
    )  # fmt: skip
    guidance_parallel: float = parameter(
        1.0, "fraction kept of guidance's change parallel to the prediction, 0 to 1; 0 reduces saturation "
        "(default: 1)", kind=float,
        flags=("--guidance-parallel",), metavar="X", group=FINER, within=Range(low=0, high=1),
    )  # fmt: skip
    guidance_norm_limit: float | None = parameter(
        None, "maximum norm of guidance's change (default: none)", kind=float, flags=("--guidance-norm-limit",),
        metavar="X", group=FINER, within=Range(low=0, low_excluded=True, words="a length above 0"),
    )  # fmt: skip
    guidance_momentum: float = parameter(
        0.0, "multiple of the last step's change to add, usually negative, such as -0.5 (default: 0)", kind=float,
        flags=("--guidance-momentum",), metavar="X", group=FINER,
        within=Range(low=-1, low_excluded=True, high=1, high_excluded=True, words="more than -1 and less than 1"),
    )  # fmt: skip
    weighting: str = parameter(
        "none", "a1111: (words:1.2) have more weight, [words] less, [a:b:0.5] changes words on the way, BREAK starts "
        "a new chunk, a long prompt is split into chunks; none: brackets are text like any other (default: {default})",
        choices=WEIGHTINGS, flags=("--weighting",), metavar="NAME", group=FINER,
    )  # fmt: skip
    clip_skip: int | None = parameter(
        None, "the text encoder's layer to use, counted from its end as in A1111: 1 is the last, 2 the one before it "
        "(default: the model's own; diffusers counts from 0)", kind=int, flags=("--clip-skip",), metavar="N",
        group=FINER, within=Range(low=1, high=MAX_CLIP_SKIP), a1111="Clip skip",
    )  # fmt: skip

    mask_edge: int = parameter(
        0, "pixels over which what is repainted blends into what is kept, within the mask's white part; the black part "
        "stays as it is (default: {default})", kind=int, flags=("--mask-edge", "--mask-blur"), metavar="PIXELS",
        group=BEGINNING, within=Range(low=0, high=MAX_EDGE),
    )  # fmt: skip
    transparency: str = parameter(
        "white", "what transparent parts of the picture become: white, or a mask of what to repaint "
        "(default: {default})", choices=TRANSPARENCIES, flags=("--transparency",), metavar="NAME", group=BEGINNING,
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_ranges(self)
        check_is_text("guidance schedule", self.guidance_schedule)
        if self.time_grid is not None:
            check_is_text("time grid", self.time_grid)
        if self.guidance_schedule not in SCHEDULES:
            raise unknown_name("guidance schedule", self.guidance_schedule, {name: name for name in SCHEDULES})
        if not isinstance(self.guidance_interval, (tuple, list)) or len(self.guidance_interval) != 2:
            raise TypeError(f"the guidance interval is {self.guidance_interval!r}, expected a pair, such as (0.1, 0.8)")
        start, stop = self.guidance_interval
        for time in (start, stop):
            check_number("a time of the guidance interval", time, float)
        if not 0 <= start <= stop <= 1:
            raise ValueError(f"the guidance interval is {start:g} to {stop:g}, expected 0 <= start <= stop <= 1")
        if self.is_projected and self.guidance_rescale:
            raise ValueError(
                f"guidance rescale is {self.guidance_rescale} and projected guidance (parallel, norm limit, momentum) "
                "is on, but both correct the same fault: use one of them"
            )
        if self.times is not None:
            from ldm.samplers.time_grids import check_falling  # imports torch

            check_falling(self.times)

    @property
    def is_projected(self) -> bool:
        return self.guidance_parallel != 1 or self.guidance_norm_limit is not None or self.guidance_momentum != 0

    @property
    def times(self) -> tuple[float, ...] | None:
        """The times in time_grid, if it is not a name. Raises ValueError if they are not numbers."""
        if self.time_grid is None or "," not in self.time_grid:
            return None
        try:
            return tuple(float(word) for word in self.time_grid.split(","))
        except ValueError:
            raise ValueError(f"the time grid is {self.time_grid!r}, expected numbers, such as 1,0.6,0.3,0") from None

    @property
    def grid(self) -> str | tuple[float, ...] | None:
        """The argument for ldm.samplers.time_grid."""
        return self.times or self.time_grid


PLAIN = DrawOptions()


def parse_embedding_argument(text: str) -> tuple[Path, str]:
    """Split PATH or NAME=PATH into an embedding's path and its name, "" for its own. An existing path with an equals
    sign is a path. Raises ValueError for an empty path or name."""
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        name, path = "", text
    if not path.strip() or (equals and path != text and not name.strip()):
        raise ValueError(f"the embedding is {text!r}, expected a file or a folder, or NAME=FILE")
    return user_path(path), name.strip()


def parse_lora_argument(text: str) -> tuple[Path, float]:
    """Split PATH or PATH:X into a LoRA's file and its strength, by default 1. A colon without a number after it belongs
    to the path.

    Raises ValueError for an empty path, or a strength out of range.
    """
    path, _, number = text.rpartition(":")
    try:
        strength = float(number)
    except ValueError:
        path, strength = text, 1.0
    if not path or path.isspace():
        raise ValueError(
            f"the LoRA is {text!r}, expected a file, or a file with its strength, as in style.safetensors:0.8"
        )
    if not abs(strength) <= MAX_LORA_STRENGTH:
        raise ValueError(
            f"the strength of LoRA {path} is {number}, expected -{MAX_LORA_STRENGTH} to {MAX_LORA_STRENGTH}"
        )
    return user_path(path), strength
