"""Draw pictures from prompts.

    python txt2img.py --prompt "a noto emoji of red apple"
    python txt2img.py --prompt "a red apple" --prompt "a green apple" --n-samples 2 --seed 7 --scale 3
    python txt2img.py --from-file prompts.txt --outdir pictures --skip-grid

Pictures go to OUTDIR/samples/00000.png and on, sheets of them to OUTDIR/grid-0000.png and on; no file is replaced.
Picture i of a prompt is drawn with seed + i, and each PNG holds all that is needed to draw it again.

A prompt file has one prompt on each line, and after it options for that line alone, if wanted:

    a red apple --n leaves --w 64 --h 64 --s 20 --d 7 --l 3.5

(negative prompt, width, height, steps, seed, scale). Hyphens and underscores in options are the same.
"""

from __future__ import annotations

import io
import os
import secrets
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ldm.cli.parser import OneLineParser, hyphenated
from ldm.cli.run import run_command
from ldm.files.messages import printable
from ldm.inference.flags import PRECISIONS, add_options
from ldm.inference.options import DrawOptions, parse_lora_argument
from ldm.inference.prompt_file import MAX_SEED, RANDOM_SEED, Request, check_range, read_prompts

if TYPE_CHECKING:
    from PIL.Image import Image
    from tqdm import tqdm

    from ldm.inference.metadata import NumberedFiles, Recipe
    from ldm.inference.pipeline import TextToImage

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "emoji64"
MAX_SAMPLES, MAX_REPEATS, MAX_COLUMNS = 256, 10_000, 256
MAX_SHEET_PIXELS = 2**25  # Pillow suspects a bomb in pictures of 2.7 times as many


def build_parser() -> ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    add_options(parser, weights=DEFAULT_WEIGHTS)
    return parser


def main(args: Namespace) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a prompt must not fail on the terminal's encoding
    requests = check_arguments(args)
    loras = [parse_lora_argument(text) for text in args.lora]
    requests = [replace(request, sampler=find_sampler(request)) for request in requests]
    begun = read_begun(args)
    for request in requests:
        check_words(request)
        check_begins(request, begun)
    check_model_serves(args.ckpt, requests)
    from ldm.inference.metadata import software
    from ldm.inference.pipeline import TextToImage

    print(f"loading {args.ckpt}", flush=True)
    pipe = TextToImage.load(
        args.ckpt, device=args.device, dtype=PRECISIONS[args.precision], vae=args.vae, lora=loras,
        ema=not args.no_ema, prediction=args.prediction,
    )  # fmt: skip
    print(f"{software()}, model {pipe.name}: {pipe.description}", flush=True)
    print(pipe.attention, flush=True)
    requests = [check_size(request, pipe, begun) for request in requests]
    warn_of_lost_words(pipe, requests)
    draw_all(pipe, requests, begun, args)


def warn_of_lost_words(pipe: TextToImage, requests: list[Request]) -> None:
    """Prompts in chunks have no end that is not seen."""
    whole = [request for request in requests if request.options.weighting == "none"]
    for text in dict.fromkeys(text for request in whole for text in (request.prompt, request.negative_prompt)):
        if lost := pipe.cut_off(text):
            print(
                f"warning: a prompt is too long for the model, which will not see its end: {printable(lost)}",
                file=sys.stderr,
            )


class Begun(NamedTuple):
    """A picture to begin with, and a mask; None: there is none."""

    image: Image | None = None
    mask: Image | None = None
    strength: float = 0.0


def read_begun(args: Namespace) -> Begun:
    """Raises ValueError or OSError for what is no picture, or no number."""
    if args.init_img is None:
        for option, given in (("--mask", args.mask), ("--strength", args.strength)):
            if given is not None:
                raise ValueError(f"{option} is of a picture to begin with: give --init-img too")
        return Begun()
    from ldm.inference.img2img import read_picture, usual_strength

    try:
        strength = usual_strength(args.strength, masked=args.mask is not None)
    except ValueError as error:
        raise ValueError(f"--{error}") from error
    mask = None if args.mask is None else read_picture(args.mask)
    return Begun(read_picture(args.init_img), mask, strength)


def check_begins(request: Request, begun: Begun) -> None:
    """Raise ValueError if so little strength leaves no step to take."""
    if begun.image is None:
        return
    from ldm.inference.img2img import steps_left

    try:
        steps_left(request.steps, begun.strength)
    except ValueError as error:
        raise ValueError(f"{request.place}--{error}") from error


def check_arguments(args: Namespace) -> list[Request]:
    """All that is to be drawn. Raises ValueError or OSError for what is wrong without a look at the model."""
    check_range("--n-samples", args.n_samples, 1, MAX_SAMPLES)
    check_range("--n-iter", args.n_iter, 1, MAX_REPEATS)
    check_range("--n-rows", args.n_rows, 0, MAX_COLUMNS)
    options = DrawOptions(
        eta=args.eta, time_grid=args.time_grid, guidance_schedule=args.guidance_schedule,
        guidance_interval=tuple(args.guidance_interval), guidance_rescale=args.guidance_rescale,
        guidance_parallel=args.guidance_parallel, guidance_norm_limit=args.guidance_norm_limit,
        guidance_momentum=args.guidance_momentum, weighting=args.weighting,
    )  # fmt: skip
    steps = args.steps if args.steps is not None else len(options.times) - 1 if options.times else Request.steps
    defaults = Request(
        negative_prompt=args.negative_prompt, steps=steps, scale=args.scale, sampler=args.sampler,
        seed=args.seed, height=args.H, width=args.W, options=options,
    )  # fmt: skip
    defaults = with_seed(defaults, args)
    requests = [replace(defaults, prompt=prompt) for prompt in args.prompt]
    if args.from_file is not None:
        requests += [with_seed(request, args) for request in read_prompts(args.from_file, defaults)]
    if not requests:
        raise ValueError('there is nothing to draw: give a prompt, as in --prompt "a red apple", or --from-file FILE')
    if not args.ckpt.exists():
        raise FileNotFoundError(f"there is no model at {args.ckpt}: give its folder or file with --ckpt")
    for option, path in [("--vae", args.vae), *(("--lora", parse_lora_argument(text)[0]) for text in args.lora)]:
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{option}: there is nothing at {path}: give a file that is there")
    if not args.skip_grid:
        check_folder(args.outdir)
    if not args.skip_save:
        check_folder(args.outdir / "samples")
    return requests


def with_seed(request: Request, args: Namespace) -> Request:
    """The request with a definite seed. The command line's random one is the same for all its prompts."""
    seed = secrets.randbelow(2**32) if request.seed == RANDOM_SEED else request.seed
    last = seed + args.n_samples * args.n_iter - 1
    if last > MAX_SEED:
        raise ValueError(f"{request.place}seed is {seed}, so that the last picture's would be {last}, above {MAX_SEED}")
    return replace(request, seed=seed)


def check_folder(folder: Path) -> None:
    """Raise OSError or ValueError if the folder cannot be made or written to; nothing is made yet."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir():
        raise ValueError(f"--outdir: pictures cannot go to {folder}, for {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"--outdir: pictures cannot go to {folder}, for {nearest} may not be written to")


def find_sampler(request: Request) -> str:
    """The sampler's name in SAMPLERS, for it or A1111's label in any case."""
    from ldm.samplers import sampler_named

    try:
        return sampler_named(request.sampler)
    except ValueError as error:
        raise ValueError(f"{request.place}{error}") from error


def check_words(request: Request) -> None:
    """Raise ValueError for weights in a prompt that are none."""
    from text.weighting import check_weights

    try:
        for prompt in (request.prompt, request.negative_prompt):
            if request.options.weighting == "a1111":
                check_weights(prompt)
    except ValueError as error:
        raise ValueError(f"{request.place}{error}") from error


def check_model_serves(ckpt: Path, requests: list[Request]) -> None:
    """Raise ValueError if the model's path has no such time grid, or its network has not what a sampler needs.

    Only two small files of the model are read. One that is not there is left to TextToImage.load.
    """
    from ldm.interop.diffusers_layout.denoiser import ALL_LAYOUTS, read_denoiser_config
    from ldm.interop.diffusers_layout.scheduler import read_scheduler
    from ldm.interop.network_files import model_folder
    from ldm.samplers import SAMPLERS, time_grid

    folder = model_folder(ckpt)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    path = read_scheduler(scheduler)[0] if scheduler.exists() else None
    networks = [file for layout in ALL_LAYOUTS if (file := folder / layout.folder / "config.json").exists()]
    for request in requests:
        sampler = SAMPLERS[request.sampler]
        try:
            sampler.with_eta(request.options.eta)
            if path is not None:
                time_grid(path, request.steps, request.options.grid)
            for network in networks if sampler.learned_variance else []:
                sampler.check(learned=read_denoiser_config(network)[1].learned_variance)
        except ValueError as error:
            raise ValueError(f"{request.place}{error}") from error


def check_size(request: Request, pipe: TextToImage, begun: Begun) -> Request:
    """The request with a definite size, or ValueError if the model cannot draw it."""
    height = width = pipe.native_size
    if begun.image is not None:
        from ldm.inference.img2img import fitting

        height, width = fitting(begun.image, pipe.factor)
    height, width = request.height or height, request.width or width
    for name, side in (("height", height), ("width", width)):
        if side % pipe.factor:
            lower = side // pipe.factor * pipe.factor
            near = " or ".join(str(multiple) for multiple in (lower, lower + pipe.factor) if multiple)
            raise ValueError(f"{request.place}{name} is {side}, expected a multiple of {pipe.factor}, as {near}")
    return replace(request, height=height, width=width)


def draw_all(pipe: TextToImage, requests: list[Request], begun: Begun, args: Namespace) -> None:
    from tqdm import tqdm

    from ldm.inference.metadata import NumberedFiles, png_bytes

    samples = None if args.skip_save else NumberedFiles(args.outdir / "samples", digits=5)
    grids = None if args.skip_grid else NumberedFiles(args.outdir, prefix="grid-", digits=4)
    sheet = Sheet(grids, columns=args.n_rows or args.n_samples) if grids else None
    total = sum(request.steps for request in requests) * args.n_iter
    with tqdm(total=total, unit="step", disable=None, leave=False) as bar:  # None: no bar where nobody watches
        for request in requests:
            bar.write(f'"{printable(request.prompt)}"')
            for repeat in range(args.n_iter):
                batch = replace(request, seed=request.seed + repeat * args.n_samples)
                images, recipes = draw(pipe, batch, begun, args, bar)
                for image, recipe in zip(images, recipes, strict=True):
                    path = f"  {samples.write(png_bytes(image, [recipe]))}" if samples else ""
                    bar.write(f"  seed {recipe.seed}{path}")
                if sheet:
                    sheet.add(images, recipes)
    if sheet:
        sheet.write()


def draw(
    pipe: TextToImage, request: Request, begun: Begun, args: Namespace, bar: tqdm
) -> tuple[list[Image], list[Recipe]]:
    """n_samples pictures from the request's seed on, each with its recipe."""
    from ldm.inference.metadata import Recipe, software

    before, hashes = bar.n, hashes_beside(args)

    def progress(done: int, of_all: int) -> None:
        bar.update(before + request.steps * done // of_all - bar.n)

    images = pipe(
        request.prompt, negative_prompt=request.negative_prompt, steps=request.steps, scale=request.scale,
        sampler=request.sampler, seed=request.seed, n=args.n_samples, height=request.height, width=request.width,
        image=begun.image, mask=begun.mask,
        strength=begun.strength if begun.image else None, options=request.options, progress=progress,
    )  # fmt: skip
    recipes = [
        Recipe(
            prompt=request.prompt, negative_prompt=request.negative_prompt, steps=request.steps, scale=request.scale,
            sampler=request.sampler, seed=request.seed + i, width=image.width, height=image.height, model=pipe.name,
            weights_hash=pipe.weights_hash, device=str(pipe.device), precision=pipe.precision,
            software=software(), options=request.options, strength=begun.strength, ema=not args.no_ema,
            prediction=args.prediction or "", **hashes,
        )
        for i, image in enumerate(images)
    ]  # fmt: skip
    return images, recipes


@cache
def file_hash(path: Path) -> str:
    from ldm.files.digest import short_hash

    return short_hash([path]) if path.is_file() else ""


def hashes_beside(args: Namespace) -> dict[str, str]:
    """Of Recipe: which files there were beside the model."""
    loras = [(text, parse_lora_argument(text)[0]) for text in args.lora]
    return {
        "vae": f"{args.vae.name} {file_hash(args.vae)}".strip() if args.vae else "",
        "loras": ", ".join(f"{Path(text).name} {file_hash(path)}" for text, path in loras),
        "init_image": file_hash(args.init_img) if args.init_img else "",
        "mask": file_hash(args.mask) if args.mask else "",
    }


class Sheet:
    """Rows of pictures that become one file, or several where their size changes or the file would grow too large."""

    def __init__(self, files: NumberedFiles, *, columns: int) -> None:
        self.files, self.columns = files, columns
        self.images: list[Image] = []
        self.recipes: list[Recipe] = []

    def add(self, images: list[Image], recipes: list[Recipe]) -> None:
        width, height = images[0].size
        pixels = width * height * (len(self.images) + len(images))
        if self.images and (self.images[0].size != images[0].size or pixels > MAX_SHEET_PIXELS):
            self.write()
        self.images += images
        self.recipes += recipes

    def write(self) -> None:
        """Write what was added since the last time, which must be something."""
        from tqdm import tqdm

        from ldm.inference.contact_sheet import sheet
        from ldm.inference.metadata import png_bytes

        picture = sheet(self.images, columns=min(self.columns, len(self.images)))
        tqdm.write(f"sheet {self.files.write(png_bytes(picture, self.recipes))}")
        self.images, self.recipes = [], []


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser(), hyphenated(sys.argv[1:])))
