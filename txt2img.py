"""Draw pictures from prompts.

    python txt2img.py --prompt "a noto emoji of red apple"
    python txt2img.py --prompt "a red apple" --prompt "a green apple" --n-samples 2 --seed 7 --scale 3
    python txt2img.py --from-file prompts.txt --outdir pictures --skip-grid

Pictures are written to OUTDIR/samples/00000.png and so on, contact sheets to OUTDIR/grid-0000.png and so on; no file is
replaced. Picture i of a prompt is drawn with seed + i, and each PNG contains everything needed to draw it again.

A prompt file has one prompt per line, optionally followed by options for that line only:

    a red apple --n leaves --w 64 --h 64 --s 20 --d 7 --l 3.5

(negative prompt, width, height, steps, seed, scale). Hyphens and underscores in options are equivalent.
"""

from __future__ import annotations

import io
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ldm.cli import OneLineParser, hyphenated, run_command
from ldm.files.messages import one_line, printable
from ldm.inference.flags import add_options, load_keywords, requests_of
from ldm.inference.pictures import NumberedFiles, check_folder

if TYPE_CHECKING:
    from ldm.inference.contact_sheet import Sheet
    from ldm.inference.pipeline import TextToImage
    from ldm.inference.request import DrawRequest

DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "emoji64"


def build_parser() -> ArgumentParser:
    parser = OneLineParser(__doc__ or "")
    add_options(parser, weights=DEFAULT_WEIGHTS)
    return parser


def main(args: Namespace) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a prompt must not fail because of the terminal's encoding
    requests = requests_of(args)
    about_model = load_keywords(args)
    if not args.skip_grid:
        check_folder(args.outdir)
    if not args.skip_save:
        check_folder(args.outdir / "samples")
    from ldm.interop.read_model import read_facts

    facts = read_facts(args.ckpt)
    requests = [request.check(facts) for request in requests]
    from ldm.inference.pipeline import TextToImage
    from ldm.inference.recipe import software

    print(f"loading {args.ckpt}", flush=True)
    pipe = TextToImage.load(args.ckpt, **about_model)
    print(f"{software()}, model {pipe.name}: {pipe.description}", flush=True)
    print(pipe.attention, flush=True)
    draw_and_save(pipe, [request.check(pipe.facts) for request in requests], args)


def draw_and_save(pipe: TextToImage, requests: list[DrawRequest], args: Namespace) -> None:
    from tqdm import tqdm

    from ldm.inference.contact_sheet import Sheet
    from ldm.inference.many import draw_all
    from ldm.inference.recipe import png_bytes

    samples = None if args.skip_save else NumberedFiles(args.outdir / "samples", digits=5)
    grids = None if args.skip_grid else NumberedFiles(args.outdir, prefix="grid-", digits=4)
    sheet = Sheet(grids, columns=args.n_rows or args.n_samples) if grids else None
    total = args.n_iter * sum(request.steps for request in requests)
    with (
        written_at_the_end(sheet, needed=samples is None),
        tqdm(total=total, unit="step", disable=None, leave=False) as bar,  # None: no bar unless on a terminal
    ):
        for drawings in draw_all(
            pipe, requests, n=args.n_samples, repeats=args.n_iter,
            started=lambda request: bar.write(f'"{printable(request.prompt)}"'),
            progress=lambda done, _: bar.update(done - bar.n),
        ):  # fmt: skip
            for image, recipe in drawings:
                path = f"  {samples.write(png_bytes(image, [recipe]))}" if samples else ""
                bar.write(f"  seed {recipe.seed}{path}")
            with warned_of(needed=samples is None):
                if sheet and (full := sheet.add(drawings)):
                    bar.write(f"sheet {full}")


@contextmanager
def written_at_the_end(sheet: Sheet | None, *, needed: bool) -> Iterator[None]:
    """Context manager: write the sheet of what was drawn, also after Ctrl-C or an error, which is then reported."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if sheet and sheet.drawings:
                print(f"sheet {sheet.write()}", flush=True)
        raise
    with warned_of(needed=needed):
        if sheet:
            print(f"sheet {sheet.write()}")


@contextmanager
def warned_of(*, needed: bool) -> Iterator[None]:
    """Context manager: a sheet that cannot be written is a warning, unless it is all that was asked for."""
    try:
        yield
    except OSError as error:
        if needed:
            raise
        print(f"warning: a contact sheet is left out: {one_line(error)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main, build_parser(), hyphenated(sys.argv[1:])))
