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
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.commands import OneLineParser, hyphenated, run_command
from ldm.options import SCHEDULES, DrawOptions
from ldm.prompts import MAX_SEED, RANDOM_SEED, Request, check_range, one_line, read_prompts

if TYPE_CHECKING:
    from PIL.Image import Image
    from tqdm import tqdm

    from ldm import TextToImage
    from ldm.png import NumberedFiles, Recipe

# For --help, which must not wait for PyTorch.
SAMPLER_NAMES = (
    "ddpm, ddpm_large, ddpm_learned, ddim, euler, euler_ancestral, heun, dpm2, dpmpp_2s_ancestral, dpmpp_2m, "
    "dpmpp_2m_sde, dpmpp_3m_sde, unipc_2, unipc_3, lms, plms, pndm, deis, lcm"
)
GRID_NAMES = "trailing, linear, leading, quadratic, karras, exponential, log_snr, beta, align_your_steps"
PRECISIONS = {"auto": "auto", "fp32": "fp32", "bf16": "bf16", "full": "fp32", "autocast": "bf16"}
DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "emoji64"
MAX_SAMPLES, MAX_REPEATS, MAX_COLUMNS = 256, 10_000, 256
MAX_SHEET_PIXELS = 2**25  # Pillow suspects a bomb in pictures of 2.7 times as many


def build_parser() -> ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    add = parser.add_argument
    # fmt: off
    add("--ckpt", "--model", type=Path, default=DEFAULT_WEIGHTS, metavar="PATH",
        help="model (default: weights/emoji64 beside this file)")
    add("--prompt", action="append", default=[], metavar="TEXT", help="what to draw; may be given several times")
    add("--negative-prompt", "--neg", default=Request.negative_prompt, metavar="TEXT", help="what not to draw")
    add("--from-file", "--prompts", type=Path, metavar="FILE", help="text file with one prompt on each line")
    add("--steps", "--ddim-steps", "--num-inference-steps", type=int, metavar="N",
        help=f"steps from noise to picture, 1 to 1000 (default: {Request.steps})")
    add("--scale", "--cfg", "--cfg-scale", "--guidance-scale", type=float, default=Request.scale, metavar="X",
        help="how closely to follow the prompt, from 0; 1 is no guidance (default: %(default)s)")
    add("--sampler", "--scheduler", default=Request.sampler, metavar="NAME",
        help=f"one of {SAMPLER_NAMES}, or A1111's name of it (default: %(default)s)")
    add("--seed", type=int, default=RANDOM_SEED, metavar="N",
        help="of each prompt's first picture (default: -1, random)")
    add("--n-samples", "--batch-size", type=int, default=4, metavar="N",
        help="pictures of a prompt (default: %(default)s)")
    add("--n-iter", "--images-per-prompt", type=int, default=1, metavar="N",
        help="draw that many times n-samples pictures of each prompt (default: %(default)s)")
    add("--H", "--height", type=int, metavar="PIXELS", help="height (default: as the model was trained)")
    add("--W", "--width", type=int, metavar="PIXELS", help="width (default: as the model was trained)")
    add("--outdir", "--output", type=Path, default=Path("outputs"), metavar="DIR", help="(default: %(default)s)")
    add("--precision", "--dtype", choices=PRECISIONS, default="auto", metavar="NAME",
        help="fp32 or full, bf16 or autocast (default: auto, bf16 on a GPU and fp32 on a CPU)")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: auto, a GPU if there is one)")
    add("--skip-grid", action="store_true", help="write no sheets")
    add("--skip-save", action="store_true", help="write no single pictures")
    # CompVis hands this number to make_grid(nrow=...), which is a row's length: its columns.
    add("--n-rows", type=int, default=0, metavar="N",
        help="pictures in a row of a sheet, in spite of its name (default: 0, n-samples: each prompt has its row)")
    add("--debug", action="store_true", help="show the traceback of an error")
    # fmt: on
    add_finer_options(parser)
    return parser


def add_finer_options(parser: ArgumentParser) -> None:
    """Those of DrawOptions."""
    add = parser.add_argument_group("finer options").add_argument
    # fmt: off
    add("--eta", "--ddim-eta", type=float, metavar="X",
        help="share of fresh noise in ddim and the ancestral samplers, 0 to 1 (default: 0 in ddim, 1 in those)")
    add("--time-grid", "--schedule-type", metavar="NAME",
        help=f"which times to visit: one of {GRID_NAMES}, or the times themselves, falling from 1 (noise) to 0, "
        "as 1,0.6,0.3,0 (default: trailing, or karras for models on EDM's path)")
    add("--guidance-interval", type=float, nargs=2, default=DrawOptions.guidance_interval, metavar=("START", "STOP"),
        help="times at which guidance is on, 0 is the picture and 1 the noise (default: 0 1)")
    add("--guidance-schedule", default=DrawOptions.guidance_schedule, metavar="NAME",
        help=f"how the scale changes from noise to picture: {', '.join(SCHEDULES)} (default: %(default)s)")
    add("--guidance-rescale", type=float, default=DrawOptions.guidance_rescale, metavar="X",
        help="against too bright pictures at large scales, 0 to 1; 0.7 is usual (default: 0)")
    add("--guidance-parallel", type=float, default=DrawOptions.guidance_parallel, metavar="X",
        help="share kept of what guidance changes along the answer itself; 0 against garish colours (default: 1)")
    add("--guidance-norm-limit", type=float, metavar="X", help="longest change by guidance (default: none)")
    add("--guidance-momentum", type=float, default=DrawOptions.guidance_momentum, metavar="X",
        help="share of the last step's change, usually negative, as -0.5 (default: 0)")
    # fmt: on


def main(args: Namespace) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a prompt must not fail on the terminal's encoding
    requests = check_arguments(args)
    requests = [replace(request, sampler=find_sampler(request)) for request in requests]
    check_model_serves(args.ckpt, requests)
    from ldm import TextToImage
    from ldm.png import software

    print(f"loading {args.ckpt}", flush=True)
    pipe = TextToImage.load(args.ckpt, device=args.device, dtype=PRECISIONS[args.precision])
    print(f"{software()}, model {pipe.name} ({pipe.weights_hash}), {pipe.attention}", flush=True)
    requests = [check_size(request, pipe) for request in requests]
    for text in dict.fromkeys(text for request in requests for text in (request.prompt, request.negative_prompt)):
        if lost := pipe.cut_off(text):
            print(
                f"warning: a prompt is too long for the model, which will not see its end: {one_line(lost)}",
                file=sys.stderr,
            )
    draw_all(pipe, requests, args)


def check_arguments(args: Namespace) -> list[Request]:
    """All that is to be drawn. Raises ValueError or OSError for what is wrong without a look at the model."""
    check_range("--n-samples", args.n_samples, 1, MAX_SAMPLES)
    check_range("--n-iter", args.n_iter, 1, MAX_REPEATS)
    check_range("--n-rows", args.n_rows, 0, MAX_COLUMNS)
    options = DrawOptions(
        eta=args.eta, time_grid=args.time_grid, guidance_schedule=args.guidance_schedule,
        guidance_interval=tuple(args.guidance_interval), guidance_rescale=args.guidance_rescale,
        guidance_parallel=args.guidance_parallel, guidance_norm_limit=args.guidance_norm_limit,
        guidance_momentum=args.guidance_momentum,
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
        raise FileNotFoundError(f"there is no model at {args.ckpt}: give the folder of one with --ckpt")
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


def check_model_serves(ckpt: Path, requests: list[Request]) -> None:
    """Raise ValueError if the model's path has no such time grid, or its network has not what a sampler needs.

    Only two small files of the model are read. One that is not there is left to TextToImage.load.
    """
    from ldm.interop.denoiser import learns_variance
    from ldm.interop.files import described_by, model_folder, read_json
    from ldm.interop.scheduler import read_scheduler
    from ldm.samplers import SAMPLERS, time_grid

    folder = model_folder(ckpt)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    path = read_scheduler(scheduler)[0] if scheduler.exists() else None
    networks = [file for part in ("transformer", "unet") if (file := folder / part / "config.json").exists()]
    for request in requests:
        sampler = SAMPLERS[request.sampler]
        try:
            sampler.with_eta(request.options.eta)
            if path is not None:
                time_grid(path, request.steps, request.options.grid)
            for network in networks if sampler.learned_variance else []:
                with described_by(network):
                    learned = learns_variance(read_json(network))
                sampler.check(learned=learned)
        except ValueError as error:
            raise ValueError(f"{request.place}{error}") from error


def check_size(request: Request, pipe: TextToImage) -> Request:
    """The request with a definite size, or ValueError if the model cannot draw it."""
    height, width = request.height or pipe.native_size, request.width or pipe.native_size
    for name, side in (("height", height), ("width", width)):
        if side % pipe.factor:
            lower = side // pipe.factor * pipe.factor
            near = " or ".join(str(multiple) for multiple in (lower, lower + pipe.factor) if multiple)
            raise ValueError(f"{request.place}{name} is {side}, expected a multiple of {pipe.factor}, as {near}")
    return replace(request, height=height, width=width)


def draw_all(pipe: TextToImage, requests: list[Request], args: Namespace) -> None:
    from tqdm import tqdm

    from ldm.png import NumberedFiles, png_bytes

    samples = None if args.skip_save else NumberedFiles(args.outdir / "samples", digits=5)
    grids = None if args.skip_grid else NumberedFiles(args.outdir, prefix="grid-", digits=4)
    sheet = Sheet(grids, columns=args.n_rows or args.n_samples) if grids else None
    total = sum(request.steps for request in requests) * args.n_iter
    with tqdm(total=total, unit="step", disable=None, leave=False) as bar:  # None: no bar where nobody watches
        for request in requests:
            bar.write(f'"{one_line(request.prompt)}"')
            for repeat in range(args.n_iter):
                batch = replace(request, seed=request.seed + repeat * args.n_samples)
                images, recipes = draw(pipe, batch, args, bar)
                for image, recipe in zip(images, recipes, strict=True):
                    path = f"  {samples.write(png_bytes(image, [recipe]))}" if samples else ""
                    bar.write(f"  seed {recipe.seed}{path}")
                if sheet:
                    sheet.add(images, recipes)
    if sheet:
        sheet.write()


def draw(pipe: TextToImage, request: Request, args: Namespace, bar: tqdm) -> tuple[list[Image], list[Recipe]]:
    """n_samples pictures from the request's seed on, each with its recipe."""
    from ldm.png import Recipe, software

    before = bar.n

    def progress(done: int, of_all: int) -> None:
        bar.update(before + request.steps * done // of_all - bar.n)

    images = pipe(
        request.prompt, negative_prompt=request.negative_prompt, steps=request.steps, scale=request.scale,
        sampler=request.sampler, seed=request.seed, n=args.n_samples, height=request.height, width=request.width,
        options=request.options, progress=progress,
    )  # fmt: skip
    recipes = [
        Recipe(
            prompt=request.prompt, negative_prompt=request.negative_prompt, steps=request.steps, scale=request.scale,
            sampler=request.sampler, seed=request.seed + i, width=image.width, height=image.height, model=pipe.name,
            weights_hash=pipe.weights_hash, device=str(pipe.device), precision=pipe.precision,
            software=software(), options=request.options,
        )
        for i, image in enumerate(images)
    ]  # fmt: skip
    return images, recipes


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

        from ldm.grids import sheet
        from ldm.png import png_bytes

        picture = sheet(self.images, columns=min(self.columns, len(self.images)))
        tqdm.write(f"sheet {self.files.write(png_bytes(picture, self.recipes))}")
        self.images, self.recipes = [], []


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser(), hyphenated(sys.argv[1:])))
