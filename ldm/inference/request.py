"""Everything that a picture depends on in addition to the model. Does not import torch, so that --help is fast."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

from ldm.inference.given_pictures import given_picture
from ldm.inference.options import BEGINNING, PLAIN, DrawOptions
from ldm.inference.parameter import Range, check_is_text, check_ranges, keys_of, parameter
from ldm.inference.pictures import TRANSPARENCY, as_read, mask_of_transparency, picture_hash
from ldm.inference.size import MAX_SIDE, size_of
from ldm.model.facts import STOCK, UNKNOWN, ModelFacts

if TYPE_CHECKING:
    from PIL import Image

RANDOM_SEED = -1
OUR_SAMPLER = "dpmpp_2m"  # of models whose folder does not state one
MAX_SEED = 2**63 - 1
MAX_STEPS = 1000
MAX_CHARACTERS = 10_000  # of a prompt: far more than any text encoder reads, and few enough for an image's metadata
IMAGE_STRENGTH, MASK_STRENGTH = 0.75, 1.0  # the defaults without a mask and with one


@dataclass(frozen=True, kw_only=True)
class PictureSettings:
    """The fields that a request for a picture and the record of one have in common.

    Raises ValueError, naming the value, for anything out of range.
    """

    prompt: str = parameter(
        "", "what to draw; may be repeated", flags=("--prompt",), metavar="TEXT", in_line=("prompt",)
    )
    negative_prompt: str = parameter(
        "", "what not to draw", flags=("--negative-prompt", "--neg"), metavar="TEXT", in_line=("n", "negative_prompt")
    )
    steps: int = parameter(
        30, "steps from noise to picture, 1 to 1000 (default: {default})", kind=int, metavar="N",
        flags=("--steps", "--ddim-steps", "--num-inference-steps"), within=Range(low=1, high=MAX_STEPS),
        in_line=("s", "steps"), a1111="Steps",
    )  # fmt: skip
    sampler: str = parameter(
        "", "one of {names}, or its name in A1111, such as 'DPM++ 2M Karras' (default: the model's own, which is that "
        "of the scheduler in its folder, and dpmpp_2m where that names none; with a time grid dpmpp_2m)",
        names=keys_of("SAMPLERS", "samplers/__init__.py"),
        flags=("--sampler", "--scheduler"), metavar="NAME", in_line=("sampler_name",), a1111="Sampler",
    )  # fmt: skip
    scale: float = parameter(
        5.0, "how closely to follow the prompt, 0 or more; 1: no guidance (default: {default})", kind=float,
        flags=("--scale", "--cfg", "--cfg-scale", "--guidance-scale"), metavar="X", in_line=("l", "cfg_scale"),
        within=Range(low=0, words="0 or more (1: no guidance)"), a1111="CFG scale",
    )  # fmt: skip
    seed: int = parameter(
        RANDOM_SEED, "seed of each prompt's first picture; picture i has seed + i (default: {default}, random)",
        kind=int, flags=("--seed",), metavar="N", within=Range(low=RANDOM_SEED, high=MAX_SEED), in_line=("d", "seed"),
        a1111="Seed",
    )  # fmt: skip
    height: int | None = parameter(
        None, "height (default: the model's, as in training)", kind=int, flags=("--H", "--height"), metavar="PIXELS",
        within=Range(low=1, high=MAX_SIDE), in_line=("h", "height"),
    )  # fmt: skip
    width: int | None = parameter(
        None, "width (default: the model's, as in training)", kind=int, flags=("--W", "--width"), metavar="PIXELS",
        within=Range(low=1, high=MAX_SIDE), in_line=("w", "width"),
    )  # fmt: skip
    options: DrawOptions = PLAIN  # the less common settings

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt"):
            check_text(name.replace("_", " "), getattr(self, name))
        check_is_text("sampler", self.sampler)
        check_ranges(self)
        if not isinstance(self.options, DrawOptions):
            raise TypeError(f"options is a {type(self.options).__name__}, expected DrawOptions(...)")


@dataclass(frozen=True, kw_only=True)
class DrawRequest(PictureSettings):
    """One prompt and how to draw it: everything that a picture depends on in addition to the model.

    It is validated when it is created, and by `check` against a model: nowhere else. If several pictures are drawn,
    picture i has seed + i. image and mask may be given as paths, arrays or tensors, too: see given_picture.
    """

    image: Image.Image | None = parameter(
        None, "picture to start from; the default size is then its own, rounded down to what the model can draw, and "
        "scaled if it has more than four times the model's pixels, or less than a fourth",
        flags=("--init-img", "--image-path"), metavar="FILE", group=BEGINNING,
    )  # fmt: skip
    mask: Image.Image | None = parameter(
        None, "picture of what to repaint: white is repainted; black, and what is transparent, is kept as it is",
        flags=("--mask", "--mask-path"), metavar="FILE", group=BEGINNING,
    )  # fmt: skip
    strength: float | None = parameter(
        None, "how much may change, above 0 to 1: this fraction of the steps is taken (default: 0.75, with a mask 1)",
        kind=float, flags=("--strength",), metavar="X", group=BEGINNING,
        within=Range(
            low=0, low_excluded=True, high=1, words="above 0 and at most 1 (0: nothing may change, 1: everything)"
        ),
    )  # fmt: skip
    place: str = field(default="", compare=False, repr=False)  # start of an error message: "prompts.txt, line 3: "
    # What is not drawn as it was asked for: `check` finds it, and warns of it.
    remarks: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._read_pictures()
        if self.image is None:
            for name in ("mask", "strength"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"a {name} was given without an image, which it needs: give an image to start from, too"
                    )
        if self.mask is None and self.options.mask_edge:
            raise ValueError(f"mask edge is {self.options.mask_edge}, but there is no mask: give one, too")
        if self.image is not None and (strength := self.usual_strength) is not None:
            steps_left(self.steps, strength)

    def _read_pictures(self) -> None:
        """Convert image and mask as files are, and make a mask of the image's transparency if that is asked for."""
        for name in ("image", "mask"):
            if (given := getattr(self, name)) is not None:
                picture = given_picture(name, given)
                try:
                    object.__setattr__(self, name, as_read(picture))
                except ValueError as error:
                    raise ValueError(f"the {name} cannot be used: {error}") from error
        if self.options.transparency != "mask":
            return
        if self.mask is not None and picture_hash(self.mask) != TRANSPARENCY:
            raise ValueError("transparency is 'mask', and a mask was given, too: leave one of them out")
        mask = None if self.image is None else mask_of_transparency(self.image)
        if mask is None:
            raise ValueError("transparency is 'mask', but there is no picture with transparent parts: give a mask")
        object.__setattr__(self, "mask", mask)

    @property
    def usual_strength(self) -> float | None:
        """The given strength, or the default without a mask or with one; None: the drawing starts from noise."""
        if self.image is None or self.strength is not None:
            return self.strength
        return IMAGE_STRENGTH if self.mask is None else MASK_STRENGTH

    def seeded(self, pictures: int = 1) -> DrawRequest:
        """Return the request with a seed, drawn if it is -1. Raises ValueError if the last picture's is too large."""
        seed = secrets.randbelow(2**32) if self.seed == RANDOM_SEED else self.seed
        last = seed + pictures - 1
        if last > MAX_SEED:
            raise ValueError(
                f"{self.place}seed is {seed}, so that the last picture's would be {last}, above {MAX_SEED}: reduce it"
            )
        return replace(self, seed=seed)

    def check(self, facts: ModelFacts = UNKNOWN) -> DrawRequest:
        """Return the request as this model draws it, with sampler, size and strength filled in.

        Raises ValueError, starting with `place` and naming the value, for what the model cannot draw. Where a fact is
        unknown, nothing is checked or filled in.
        """
        try:
            return self._checked(facts)
        except ValueError as error:
            raise ValueError(f"{self.place}{error}") from error

    def _checked(self, facts: ModelFacts) -> DrawRequest:
        from ldm.samplers import SAMPLERS, evaluations_of, time_grid
        from text.weighting import check_prompt

        name, grid = self._sampler(facts)
        options = replace(self.options, time_grid=grid)
        if name in SAMPLERS:
            SAMPLERS[name].with_eta(options.eta)
        if facts.path is not None and name != STOCK:
            time_grid(facts.path, self.steps, options.grid)
        if facts.learned_variance is not None and name in SAMPLERS:
            SAMPLERS[name].check(learned=facts.learned_variance)
        if self.options.weighting == "a1111":
            evaluations = self.steps * evaluations_of(name, facts.scheduler)
            check_prompt(self.prompt, evaluations)  # raises for a weight out of range
            check_prompt(self.negative_prompt, evaluations)
        if facts.for_inpainting and self.mask is None:
            wanted = "it an image and a mask" if self.image is None else "a mask too, white where to paint"
            if self.image is not None and self.image.mode == "RGBA":
                wanted += ", or transparency 'mask' to paint where the picture is transparent"
            raise ValueError(f"{facts.name} is made for inpainting: give {wanted}")
        remarks: list[str] = []
        height, width = size_of(self.image, self.height, self.width, facts, remark=remarks.append)
        if self.image is not None and self.image.mode == "RGBA" and self.options.transparency == "white":
            instead = "" if self.mask else "; transparency 'mask' (--transparency mask) repaints them instead"
            remarks.append(f"the picture's transparent parts become white{instead}")
        checked = replace(self, sampler=name, height=height, width=width, strength=self.usual_strength, options=options)
        return checked.remarked(remarks)

    def remarked(self, remarks: Sequence[str]) -> DrawRequest:
        """Return the request with further remarks, and warn of those that are new."""
        new = [remark for remark in dict.fromkeys(remarks) if remark not in self.remarks]
        for remark in new:
            warnings.warn(f"{self.place}{remark}", stacklevel=5)
        return replace(self, remarks=(*self.remarks, *new))

    def _sampler(self, facts: ModelFacts) -> tuple[str, str | None]:
        """Return the sampler and the time grid: keys of SAMPLERS and TIME_GRIDS (or times, or None for the path's
        default); STOCK for the sampler that the model's folder states, or "" while the model is not known.

        Raises ValueError for an unknown name, and for steps or an eta that a stock scheduler does not have.
        """
        from ldm.samplers import sampler_and_grid
        from ldm.samplers.stock.plan import stock_plan

        grid = self.options.time_grid
        if self.sampler.lower() not in ("", STOCK):
            return sampler_and_grid(self.sampler, grid)
        if grid is not None or (facts.path is not None and facts.scheduler is None):
            return sampler_and_grid(OUR_SAMPLER, grid)
        if facts.path is None or facts.scheduler is None:
            return "", None
        if self.options.eta is not None and not facts.scheduler.has_eta:
            raise ValueError(
                f"the model's own sampler {facts.scheduler.kind} has no eta: leave it out, or name a sampler"
            )
        stock_plan(facts.scheduler, cast(Any, facts.path), "eps", self.steps)
        return STOCK, None


def check_text(name: str, text: str) -> None:
    """Raise ValueError for a text that is too long, or that a PNG cannot hold, and TypeError for what is no text."""
    check_is_text(name, text)
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the {name} has {len(text)} characters, expected at most {MAX_CHARACTERS}: shorten it")
    # Python converts bytes on the command line that are not UTF-8 to surrogates. A PNG cannot store these, or zeros.
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
        raise ValueError(f"the {name} is {text[:40]!r}, with a zero byte or bytes that are not UTF-8: remove them")


def steps_left(steps: int, strength: float) -> int:
    """Count the steps of a grid that are taken: int(steps x strength). Raises ValueError if there are none."""
    left = int(steps * strength)
    if left < 1:
        raise ValueError(f"strength {strength} leaves none of {steps} steps, expected at least 1: increase either")
    return left
