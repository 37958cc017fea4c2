"""The command line of txt2img.py. Does not import torch, so that --help is fast."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldm.files.paths import user_path
from ldm.inference.options import DrawOptions, parse_embedding_argument, parse_lora_argument
from ldm.inference.parameter import Range, parameters
from ldm.inference.pictures import read_picture
from ldm.inference.prompt_file import read_prompts
from ldm.inference.request import DrawRequest
from ldm.interop.hub_cache import missing_model, model_path
from ldm.model.precision import is_auto, precision_named

PREDICTIONS = ("eps", "v", "x0", "velocity", "edm")
COUNTS = {"n_samples": Range(low=1, high=256), "n_iter": Range(low=1, high=10_000), "n_rows": Range(low=0, high=256)}
PICTURES = ("image", "mask")  # parameters whose value is a file to read


def add_options(parser: ArgumentParser, *, weights: Path) -> None:
    """Add all options of txt2img.py. weights: the default model."""
    add_parameters(parser)
    add = parser.add_argument
    # fmt: off
    add("--ckpt", "--model", type=model_path, default=weights, metavar="PATH",
        help="model: a run, a folder in diffusers' layout, or Stable Diffusion 1 or 2 in a single file, "
        ".safetensors or .ckpt; or the name of one in the Hub's cache (default: weights/emoji64 next to this file)")
    add("--from-file", "--prompts", type=user_path, metavar="FILE", help="text file with one prompt per line")
    add("--n-samples", "--batch-size", type=int, default=4, metavar="N",
        help="pictures per prompt (default: %(default)s)")
    add("--n-iter", "--images-per-prompt", type=int, default=1, metavar="N",
        help="how often to draw n-samples pictures of each prompt (default: %(default)s)")
    add("--outdir", "--output", type=user_path, default=Path("outputs"), metavar="DIR", help="(default: %(default)s)")
    add("--precision", "--dtype", type=precision_or_auto, default="auto", metavar="NAME",
        help="fp32 (or float32, full), bf16 (bfloat16, autocast), or on a GPU fp16 (float16, half), which leaves the "
        "autoencoder in fp32 (default: auto: bf16 on a GPU that has it, fp16 on another, fp32 on a CPU)")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda, cuda:1 ... (default: auto, a GPU if there is one)")
    add("--skip-grid", action="store_true", help="do not write contact sheets")
    add("--skip-save", action="store_true", help="do not write single pictures")
    # CompVis passes this number to make_grid(nrow=...), which is the length of a row.
    add("--n-rows", type=int, default=0, metavar="N",
        help="pictures per row of a sheet, despite the name (default: 0, n-samples: one row per prompt)")
    add("--debug", action="store_true", help="show the traceback of an error")
    # fmt: on
    add_model_options(parser)


def add_model_options(parser: ArgumentParser) -> None:
    """Add the options for parts of the model, and for properties that its file may not specify."""
    add = parser.add_argument_group("the model").add_argument
    # fmt: off
    add("--vae", type=model_path, metavar="PATH",
        help="autoencoder in place of the model's own, if it has any: a file or a folder")
    add("--text", type=model_path, metavar="PATH",
        help="text encoder in place of the model's own, if it has any: a folder with text_encoder/ and tokenizer/, or "
        "a model that has one, in a folder or a file")
    add("--lora", action="append", default=[], metavar="PATH[:X]",
        help="LoRA, and its strength (default: 1); may be repeated")
    add("--lora-folder", type=user_path, action="append", default=[], metavar="DIR",
        help="folder of the LoRAs that prompts name, as in <lora:style:0.8>; may be repeated")
    add("--embedding", "--embeddings", action="append", default=[], metavar="PATH",
        help="textual inversion, used by its name in a prompt: a file, NAME=FILE, or a folder; may be repeated")
    add("--no-ema", action="store_true", help="use the weights that are not averaged, if a file has both")
    add("--prediction", choices=PREDICTIONS, metavar="NAME",
        help=f"what the model predicts, if its file does not specify it correctly: {', '.join(PREDICTIONS)}")
    # fmt: on


def precision_argument(text: str) -> str:
    """Parse a precision by any of its names. Raises ArgumentTypeError, listing them."""
    try:
        return precision_named(text, what="the precision")
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error


def precision_or_auto(text: str) -> str:
    return "auto" if is_auto(text) else precision_argument(text)


def add_parameters(parser: ArgumentParser) -> None:
    """Add an option for each parameter of DrawRequest and DrawOptions; None if it is not given."""
    groups: dict[str, Any] = {"": parser}
    for fields in (DrawRequest, DrawOptions):
        for name, about in parameters(fields).items():
            if about.group not in groups:
                groups[about.group] = parser.add_argument_group(about.group)
            groups[about.group].add_argument(
                *about.flags,
                dest=name,
                action="append" if name == "prompt" else "store",
                type=user_path if name in PICTURES else about.kind,
                nargs=len(about.metavar) if isinstance(about.metavar, tuple) else None,
                choices=about.choices or None,
                metavar=about.metavar,
                help=about.help_for(getattr(fields, name)),
            )


def requests_of(args: Namespace) -> list[DrawRequest]:
    """List the requests, each with a seed: if none is given, all prompts get the same random one.

    Raises ValueError or OSError for every mistake that can be found without the model.
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
    """Create the request that all prompts start from; the lines of a prompt file may change it."""
    given = {name: value for name, value in vars(args).items() if value is not None and name != "prompt"}
    for name in ("mask", "strength", "mask_edge", "transparency"):
        if name in given and "image" not in given:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} was given without --init-img, which it needs: give both")
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
    """Return the keywords of TextToImage.load. Raises ValueError or OSError for a missing file."""
    loras = [parse_lora_argument(text) for text in args.lora]
    embeddings = [parse_embedding_argument(text) for text in args.embedding]
    if not args.ckpt.exists():
        raise FileNotFoundError(f"{missing_model(args.ckpt)} with --ckpt")
    given = [("--vae", args.vae), ("--text", args.text), *(("--lora", path) for path, _ in loras)]
    given += [("--embedding", path) for path, _ in embeddings]
    for folder in args.lora_folder:
        if not folder.is_dir():
            raise FileNotFoundError(f"--lora-folder is {folder}, which is not a folder: give one that exists")
    for option, path in given:
        if path is not None and not path.exists():
            raise FileNotFoundError(f"{option} is {path}, which does not exist: give a file that does")
    named = {"lora_folders": args.lora_folder, "embeddings": embeddings}
    return {
        "device": args.device, "dtype": args.precision, "vae": args.vae, "text": args.text, "lora": loras,
        "ema": not args.no_ema, "prediction": args.prediction,
        **{name: paths for name, paths in named.items() if paths},
    }  # fmt: skip
