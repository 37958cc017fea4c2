"""Load Stable Diffusion at full size, with random weights: time it, and compare its pictures with diffusers'.

    python benchmarks/interchange.py --version 1          writes 9 GB at most below --scratch, and removes them
    python benchmarks/interchange.py --version 2 --only loading

Loading is measured in turns with safetensors alone: the time until every number has been read, from the disk and from
the system's cache, the quickest of several rounds; and the peak memory in addition to what the imports take, in a
process of its own. Drawing is 512 x 512: the same weights, seed, steps and scale here, from the single file, and in
diffusers' pipeline, from the folder, in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

TEXT = {
    1: {"width": 768, "layers": 12, "heads": 12, "intermediate_size": 3072, "projection_dim": 768},
    2: {"width": 1024, "layers": 23, "heads": 16, "intermediate_size": 4096, "projection_dim": 512,
        "activation": "gelu", "pad_id": 0},
}  # fmt: skip
PROMPT, SEED, SIDE = "an astronaut riding a horse", 7, 512
SAMPLERS = {"ddim": ("DDIMScheduler", {"clip_sample": False}), "dpmpp_2m": ("DPMSolverMultistepScheduler", {})}
ROUNDS = 5  # of loading, of which the quickest counts


def random_model(version: int) -> Any:
    """Build a network of the sizes of Stable Diffusion 1.5, or of 2.1 with v-prediction."""
    from ldm.denoisers import UNet, UNetConfig
    from ldm.diffusion import ScaledLinearBetaPath
    from ldm.model.components import ModelComponents
    from ldm.model.latent_diffusion import LatentDiffusion
    from text import TextEncoderConfig, Tokenizer, TransformersTextEncoder
    from vae import AutoencoderKL, AutoencoderKLConfig

    torch.manual_seed(0)
    text = TextEncoderConfig(**TEXT[version])
    config = UNetConfig() if version == 1 else UNetConfig(heads=(5, 10, 20, 20), use_linear_projection=True)
    unet = UNet(config, latent_channels=4, context_width=text.width)
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
    return ModelComponents(model=model, denoiser=unet, config=config, sample_size=64)


def write(version: int, scratch: Path, name: str) -> None:
    """Write the model as a folder and as a single file, in "fp32" or "fp16"."""
    from ldm.interop.compvis.writing import write_single_file
    from ldm.interop.diffusers_layout.folder import write_folder

    parts, dtype = random_model(version), {"fp32": torch.float32, "fp16": torch.float16}[name]
    write_folder(parts, scratch / name, dtype=dtype)
    write_single_file(parts, scratch / f"{name}.safetensors", dtype=dtype)


def read_by_safetensors(path: Path, dtype: torch.dtype) -> list[Any]:
    """Read every number of every tensor of a file, or of a folder's files, in this precision."""
    from safetensors.torch import load_file

    files = [path] if path.is_file() else sorted(path.rglob("*.safetensors"))
    found = [{name: tensor.to(dtype) for name, tensor in load_file(file).items()} for file in files]
    for tensors in found:
        for tensor in tensors.values():
            tensor.sum()
    return found


def read_here(path: Path, dtype: torch.dtype) -> Any:
    from ldm.interop.read_model import read_model

    return read_model(path, dtype=dtype)


def imported() -> None:
    # Else the first load would import them.
    for name in ("transformers.models.clip.modeling_clip", "ldm.inference.pipeline"):
        importlib.import_module(name)


def measure_times(path: Path, dtype: torch.dtype, place: str) -> dict[str, float]:
    """Measure the quickest of several rounds, in seconds, of safetensors and of our reader in turns."""
    imported()
    best = dict.fromkeys(READERS, float("inf"))
    for _ in range(ROUNDS):
        for who, read in READERS.items():
            for file in files_of(path):
                bring(file, place)
            started = time.perf_counter()
            kept = read(path, dtype)
            best[who] = min(best[who], time.perf_counter() - started)
            del kept
    return best


def measure_memory(path: Path, dtype: torch.dtype) -> dict[str, float]:
    """Measure the peak memory of our reader, in MB in addition to the imports."""
    imported()
    before = memory("VmRSS")
    kept = read_here(path, dtype)
    del kept
    return {"mb": memory("VmHWM") - before}


def files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.safetensors"))


def bring(file: Path, place: str) -> None:
    """Bring a file into the system's cache, or drop it from there."""
    if place == "cache":
        with file.open("rb", buffering=0) as stream:
            while stream.read(2**24):
                pass
        return
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


READERS = {"safetensors": read_by_safetensors, "here": read_here}


def memory(kind: str) -> float:
    """Return VmRSS (now) or VmHWM (peak) of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(kind)).split()[1]) / 1024


def loading(scratch: Path, version: int) -> None:
    print("| what | as | size in memory | from | safetensors | here | times as long | memory here |")
    print("|---|---|---|---|---|---|---|---|")
    for stored, wanteds in (("fp32", ["float32"]), ("fp16", ["float16", "float32"])):
        write(version, scratch, stored)
        for wanted in wanteds:
            for path in (scratch / f"{stored}.safetensors", scratch / stored):
                rows(path, stored, wanted)
        shutil.rmtree(scratch / stored)
        (scratch / f"{stored}.safetensors").unlink()


def rows(path: Path, stored: str, wanted: str) -> None:
    widened = 2 if (stored, wanted) == ("fp16", "float32") else 1
    size = widened * sum(file.stat().st_size for file in files_of(path)) / 2**20
    kind = "single file" if path.is_file() else "folder"
    most = in_a_process("memory", path, wanted)["mb"]
    for place in ("disk", "cache"):
        seconds = in_a_process("times", path, wanted, place)
        times = f"{seconds['safetensors']:.2f} s | {seconds['here']:.2f} s"
        ratios = f"{seconds['here'] / seconds['safetensors']:.2f} | {most / size:.2f} x size"
        print(f"| {kind}, {stored} | {wanted} | {size:.0f} MB | {place} | {times} | {ratios} |", flush=True)


def in_a_process(what: str, path: Path, *words: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", what, str(path), *words]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def drawing(scratch: Path, steps: int) -> None:
    import diffusers

    from ldm import DrawRequest, TextToImage

    folder = scratch / "fp32"
    theirs: Any = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    ours = TextToImage.load(scratch / "fp32.safetensors", device="cpu", dtype="fp32")
    for sampler, (scheduler, settings) in SAMPLERS.items():
        theirs.scheduler = getattr(diffusers, scheduler).from_config(theirs.scheduler.config, **settings)
        call = {"num_inference_steps": steps, "guidance_scale": 5.0, "height": SIDE, "width": SIDE}
        generator = [torch.Generator().manual_seed(SEED)]
        started = time.perf_counter()
        expected = torch.from_numpy(theirs(PROMPT, generator=generator, output_type="np", **call).images[0])
        middle = time.perf_counter()
        request = DrawRequest(
            prompt=PROMPT, steps=steps, scale=5.0, sampler=sampler, seed=SEED, height=SIDE, width=SIDE
        )
        pixels = ours.pixels(request)[0]
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
    parser.add_argument("--scratch", type=Path, help="where the files go (9 GB); default: the system's")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, path, dtype, *place = args.measure
        work = {"times": measure_times, "memory": measure_memory}[what]
        return print(json.dumps(work(Path(path), getattr(torch, dtype), *place)))
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        if args.only != "drawing":
            loading(Path(scratch), args.version)
        if args.only != "loading":
            write(args.version, Path(scratch), "fp32")
            drawing(Path(scratch), args.steps)


if __name__ == "__main__":
    main()
