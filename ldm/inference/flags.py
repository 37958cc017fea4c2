"""The words of txt2img.py's command line. Torch is not needed here: --help must not wait for it."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from ldm.inference.options import SCHEDULES, WEIGHTINGS, DrawOptions
from ldm.inference.prompt_file import RANDOM_SEED, Request

SAMPLER_NAMES = (
    "ddpm, ddpm_large, ddpm_learned, ddim, euler, euler_ancestral, heun, dpm2, dpmpp_2s_ancestral, dpmpp_2m, "
    "dpmpp_2m_sde, dpmpp_3m_sde, unipc_2, unipc_3, lms, plms, pndm, deis, lcm"
)
GRID_NAMES = "trailing, linear, leading, quadratic, karras, exponential, log_snr, beta, align_your_steps"
PRECISIONS = {"auto": "auto", "fp32": "fp32", "bf16": "bf16", "full": "fp32", "autocast": "bf16"}
PREDICTIONS = ("eps", "v", "x0", "velocity", "edm")


def add_options(parser: ArgumentParser, *, weights: Path) -> None:
    """All of txt2img.py's. weights: the model where none is named."""
    add = parser.add_argument
    # fmt: off
    add("--ckpt", "--model", type=Path, default=weights, metavar="PATH",
        help="model: a run, a folder in diffusers' layout, or Stable Diffusion 1 or 2 in one file, .safetensors or "
        ".ckpt (default: weights/emoji64 beside this file)")
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
    add_model_options(parser)
    add_picture_options(parser)
    add_finer_options(parser)


def add_model_options(parser: ArgumentParser) -> None:
    """What is put together with the model, and what its file may leave open."""
    add = parser.add_argument_group("about the model").add_argument
    # fmt: off
    add("--vae", type=Path, metavar="PATH", help="autoencoder in place of the model's own: a file or a folder")
    add("--lora", action="append", default=[], metavar="PATH[:X]",
        help="LoRA, and how strongly it counts (default: 1); may be given several times")
    add("--no-ema", action="store_true", help="of a file that holds both, the weights that are not averaged")
    add("--prediction", choices=PREDICTIONS, metavar="NAME",
        help=f"what the model predicts, if its file does not say it rightly: {', '.join(PREDICTIONS)}")
    # fmt: on


def add_picture_options(parser: ArgumentParser) -> None:
    """Image to image, and inpainting."""
    add = parser.add_argument_group("a picture to begin with").add_argument
    # fmt: off
    add("--init-img", "--image-path", type=Path, metavar="FILE",
        help="picture to begin with; H and W are then its own, rounded down to what the model takes")
    add("--mask", "--mask-path", type=Path, metavar="FILE",
        help="picture whose white is painted anew, and whose black is kept")
    add("--strength", type=float, metavar="X",
        help="how much may change, above 0 to 1: that share of the steps is taken (default: 0.75, with a mask 1)")
    # fmt: on


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
    add("--weighting", choices=WEIGHTINGS, default=DrawOptions.weighting, metavar="NAME",
        help="a1111: (words:1.2) count more, [words] less, BREAK begins another chunk, a long prompt becomes several; "
        "none: brackets are what they are (default: %(default)s)")
    # fmt: on
