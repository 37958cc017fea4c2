"""Stable Diffusion at full size, with random weights: what loading costs, and whether diffusers draws the same picture.

    python benchmarks/interchange.py --version 1          writes 13 to 16 GB below --scratch, and removes them
    python benchmarks/interchange.py --version 2 --only loading

Loading is measured side by side with safetensors alone, each in a process of its own: the time until every number has
been read, from the disk and from the system's cache, and the largest memory beyond what the imports take. Drawing is
512 x 512: the same weights, seed, steps and scale here, from the single file, and in diffusers' pipeline, from the
folder, in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

TEXT = {
    1: {"width": 768, "layers": 12, "heads": 12, "intermediate_size": 3072, "projection_dim": 768},
    2: {"width": 1024, "layers": 23, "heads": 16, "intermediate_size": 4096, "projection_dim": 512,
        "activation": "gelu", "pad_id": 0},
}  # fmt: skip
PROMPT, SEED, SIDE = "an astronaut riding a horse", 7, 512
SAMPLERS = {"ddim": "DDIMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}
ROUNDS = 3  # of loading, of which the median counts


def random_model(version: int) -> Any:
    """Stable Diffusion 1.5, or 2.1 with v-prediction, as to sizes."""
    from ldm.denoisers import UNet, UNetConfig
    from ldm.diffusion import ScaledLinearBetaPath
    from ldm.interop.parts import Parts
    from ldm.latent_diffusion import LatentDiffusion
    from text import TextEncoderConfig, Tokenizer, TransformersTextEncoder
    from vae import AutoencoderKL, AutoencoderKLConfig

    torch.manual_seed(0)
    text = TextEncoderConfig(**TEXT[version])
    config = UNetConfig() if version == 1 else UNetConfig(heads=(5, 10, 20, 20), use_linear_projection=True)
    unet = UNet(config, in_channels=4, out_channels=4, context_width=text.width)
    with torch.no_grad():
        for parameter in unet.parameters():  # what a fresh network has at zero must count
            parameter.add_(0.01 * torch.randn_like(parameter))
    model = LatentDiffusion(
        vae=AutoencoderKL(AutoencoderKLConfig()),
        text_encoder=TransformersTextEncoder(text),
        tokenizer=Tokenizer(text.tokenizer),
        path=ScaledLinearBetaPath(),
        prediction="eps" if version == 1 else "v",
    )
    return Parts(model=model, denoiser=unet, config=config, sample_size=64)


def write(version: int, scratch: Path) -> None:
    """The model as a folder and as a single file, in full and in half precision."""
    from ldm.interop.folder import write_folder
    from ldm.interop.single_file_export import write_single_file

    parts = random_model(version)
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        write_folder(parts, scratch / name, dtype=dtype)
        write_single_file(parts, scratch / f"{name}.safetensors", dtype=dtype)


def read_by_safetensors(path: Path, dtype: torch.dtype) -> list[Any]:
    """Every tensor of a file, or of a folder's files, in this precision, and each number of it read."""
    from safetensors.torch import load_file

    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    found = [{name: tensor.to(dtype) for name, tensor in load_file(file).items()} for file in files]
    for tensors in found:
        for tensor in tensors.values():
            tensor.sum()
    return found


def read_here(path: Path, dtype: torch.dtype) -> Any:
    from ldm.interop.model import read_model

    return read_model(path, dtype=dtype)


def measure(read: Callable[[Path, torch.dtype], Any], path: Path, dtype: torch.dtype) -> dict[str, float]:
    """Seconds and MB beyond the imports, in this process."""
    for name in ("transformers.models.clip.modeling_clip", "ldm.pipeline"):  # else imported by the first load
        importlib.import_module(name)

    before, started = memory("VmRSS"), time.perf_counter()
    kept = read(path, dtype)
    seconds = time.perf_counter() - started
    del kept
    return {"seconds": seconds, "mb": memory("VmHWM") - before}


READERS = {"safetensors": read_by_safetensors, "here": read_here}


def memory(kind: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) / 1024


def loading(scratch: Path) -> None:
    print("| what | as | size in memory | from | safetensors | here | times as long | memory here |")
    print("|---|---|---|---|---|---|---|---|")
    for stored, wanted in (("fp32", "float32"), ("fp16", "float16"), ("fp16", "float32")):
        for path in (scratch / f"{stored}.safetensors", scratch / stored):
            files = [path] if path.is_file() else list(path.rglob("*.safetensors"))
            widened = 2 if (stored, wanted) == ("fp16", "float32") else 1
            size = widened * sum(file.stat().st_size for file in files) / 2**20
            for place in ("disk", "cache"):
                runs = {who: in_turns(who, path, wanted, files if place == "disk" else []) for who in READERS}
                seconds = {who: sorted(run["seconds"] for run in found)[ROUNDS // 2] for who, found in runs.items()}
                most = max(run["mb"] for run in runs["here"])
                kind = "single file" if path.is_file() else "folder"
                times = f"{seconds['safetensors']:.2f} s | {seconds['here']:.2f} s"
                ratios = f"{seconds['here'] / seconds['safetensors']:.2f} | {most / size:.2f} x size"
                print(f"| {kind}, {stored} | {wanted} | {size:.0f} MB | {place} | {times} | {ratios} |", flush=True)


def in_turns(who: str, path: Path, dtype: str, not_cached: list[Path]) -> list[dict[str, float]]:
    words = [sys.executable, __file__, "--measure", who, str(path), dtype]
    found = []
    for _ in range(ROUNDS):
        for file in not_cached:
            forget(file)
        found.append(json.loads(subprocess.run(words, check=True, capture_output=True).stdout))
    return found


def forget(file: Path) -> None:
    """Take a file out of the system's cache."""
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def drawing(scratch: Path, steps: int) -> None:
    import diffusers

    from ldm import TextToImage

    folder = scratch / "fp32"
    theirs: Any = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    ours = TextToImage.load(scratch / "fp32.safetensors", device="cpu", dtype="fp32")
    for sampler, scheduler in SAMPLERS.items():
        theirs.scheduler = getattr(diffusers, scheduler).from_config(theirs.scheduler.config)
        call = {"num_inference_steps": steps, "guidance_scale": 5.0, "height": SIDE, "width": SIDE}
        generator = [torch.Generator().manual_seed(SEED)]
        started = time.perf_counter()
        expected = torch.from_numpy(theirs(PROMPT, generator=generator, output_type="np", **call).images[0])
        middle = time.perf_counter()
        settings = {"negative_prompt": "", "steps": steps, "scale": 5.0, "height": SIDE, "width": SIDE}
        pixels = ours.draw([PROMPT], sampler=sampler, seed=SEED, **settings)[0]
        ended = time.perf_counter()
        found = (pixels.clamp(-1, 1) + 1).permute(1, 2, 0) / 2
        print(
            f"{sampler}: largest difference {(found - expected).abs().max():.1e} (pictures from 0 to 1, deviation "
            f"{expected.std():.3f}); {middle - started:.0f} s in diffusers, {ended - middle:.0f} s here",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", type=int, choices=(1, 2), default=1, help="of Stable Diffusion")
    parser.add_argument("--only", choices=("loading", "drawing"), help="leave the other out")
    parser.add_argument("--steps", type=int, default=4, help="of each drawing")
    parser.add_argument("--scratch", type=Path, help="where the files go (15 GB); default: the system's")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        who, path, dtype = args.measure
        return print(json.dumps(measure(READERS[who], Path(path), getattr(torch, dtype))))
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        write(args.version, Path(scratch))
        if args.only != "drawing":
            loading(Path(scratch))
        if args.only != "loading":
            drawing(Path(scratch), args.steps)


if __name__ == "__main__":
    main()
