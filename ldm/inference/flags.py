"""The command line of txt2img.py. Torch is not needed here: --help must not wait for it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.inference.options import DrawOptions, parse_lora_argument
from ldm.inference.parameter import Range, parameters
from ldm.inference.pictures import read_picture
from ldm.inference.prompt_file import read_prompts
from ldm.inference.request import DrawRequest

PRECISIONS = {"auto": "auto", "fp32": "fp32", "bf16": "bf16", "full": "fp32", "autocast": "bf16"}
PREDICTIONS = ("eps", "v", "x0", "velocity", "edm")
COUNTS = {"n_samples": Range(low=1, high=256), "n_iter": Range(low=1, high=10_000), "n_rows": Range(low=0, high=256)}
PICTURES = ("image", "mask")  # parameters whose word is a file that is read


def add_options(parser: ArgumentParser, *, weights: Path) -> None:
    """Add all of txt2img.py's options. weights: the model where none is named."""
    add_parameters(parser)
    add = parser.add_argument
    # fmt: off
    add("--ckpt", "--model", type=Path, default=weights, metavar="PATH",
        help="model: a run, a folder in diffusers' layout, or Stable Diffusion 1 or 2 in one file, .safetensors or "
        ".ckpt (default: weights/emoji64 beside this file)")
    add("--from-file", "--prompts", type=Path, metavar="FILE", help="text file with one prompt on each line")
    add("--n-samples", "--batch-size", type=int, default=4, metavar="N",
        help="pictures of a prompt (default: %(default)s)")
    add("--n-iter", "--images-per-prompt", type=int, default=1, metavar="N",
        help="draw that many times n-samples pictures of each prompt (default: %(default)s)")
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
    add_model_options(parser)


def add_model_options(parser: ArgumentParser) -> None:
    """Add what is put together with the model, and what its file may leave open."""
    add = parser.add_argument_group("about the model").add_argument
    # fmt: off
    add("--vae", type=Path, metavar="PATH", help="autoencoder in place of the model's own: a file or a folder")
    add("--lora", action="append", default=[], metavar="PATH[:X]",
        help="LoRA, and how strongly it counts (default: 1); may be given several times")
    add("--no-ema", action="store_true", help="of a file that holds both, the weights that are not averaged")
    add("--prediction", choices=PREDICTIONS, metavar="NAME",
        help=f"what the model predicts, if its file does not say it rightly: {', '.join(PREDICTIONS)}")
    # fmt: on


def add_parameters(parser: ArgumentParser) -> None:
    """Add an option for each parameter of DrawRequest and DrawOptions. One that is not given is None."""
    groups: dict[str, Any] = {"": parser}
    for fields in (DrawRequest, DrawOptions):
        for name, about in parameters(fields).items():
            if about.group not in groups:
                groups[about.group] = parser.add_argument_group(about.group)
            groups[about.group].add_argument(
                *about.flags,
                dest=name,
                action="append" if name == "prompt" else "store",
                type=Path if name in PICTURES else about.kind,
                nargs=len(about.metavar) if isinstance(about.metavar, tuple) else None,
                choices=about.choices or None,
                metavar=about.metavar,
                help=about.help_for(getattr(fields, name)),
            )


def requests_of(args: Namespace) -> list[DrawRequest]:
    """List all that is to be drawn, each with a definite seed: without one given, all prompts have the same random one.

    Raises ValueError or OSError for what is wrong without a look at the model.
    """
    for name, allowed in COUNTS.items():
        allowed.check(f"--{name.replace('_', '-')}", getattr(args, name))
    pictures = args.n_samples * args.n_iter
    defaults = defaults_of(args).seeded(pictures)
    requests = [replace(defaults, prompt=prompt) for prompt in args.prompt or []]
    if args.from_file is not None:
        requests += [request.seeded(pictures) for request in read_prompts(args.from_file, defaults)]
    if not requests:
        raise ValueError('there is nothing to draw: give a prompt, as in --prompt "a red apple", or --from-file FILE')
    return requests


def defaults_of(args: Namespace) -> DrawRequest:
    """Make the request that all prompts share, as far as their own lines do not change it."""
    given = {name: value for name, value in vars(args).items() if value is not None and name != "prompt"}
    for name in ("mask", "strength"):
        if name in given and "image" not in given:
            raise ValueError(f"--{name} is of a picture to begin with: give --init-img too")
    of_request, of_options = (
        {name: given[name] for name in parameters(fields) if name in given} for fields in (DrawRequest, DrawOptions)
    )
    if "guidance_interval" in of_options:
        of_options["guidance_interval"] = tuple(of_options["guidance_interval"])
    options = DrawOptions(**of_options)
    if options.times:
        of_request.setdefault("steps", len(options.times) - 1)
    for name in PICTURES:
        if name in of_request:
            of_request[name] = read_picture(of_request[name])
    try:
        return DrawRequest(**of_request, options=options)
    except ValueError as error:
        raise ValueError(f"--{error}" if str(error).startswith("strength") else str(error)) from error


def load_keywords(args: Namespace) -> dict[str, Any]:
    """Return what TextToImage.load takes besides the model. Raises ValueError or OSError for a missing file."""
    loras = [parse_lora_argument(text) for text in args.lora]
    if not args.ckpt.exists():
        raise FileNotFoundError(f"there is no model at {args.ckpt}: give its folder or file with --ckpt")
    for option, path in [("--vae", args.vae), *(("--lora", path) for path, _ in loras)]:
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{option}: there is nothing at {path}: give a file that is there")
    return {
        "device": args.device, "dtype": PRECISIONS[args.precision], "vae": args.vae, "lora": loras,
        "ema": not args.no_ema, "prediction": args.prediction,
    }  # fmt: skip
