"""Training commands on tiny networks: their configurations, and how they are launched."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from helpers.forking import ROOT, free_port, python_here

BIN = Path(sys.executable).parent

RUN = {"steps": 10, "log_every": 1, "sample_every": 5, "checkpoint_every": 5}
OPTIM = {"lr": 1e-3, "warmup_steps": 2}
VAE = {"block_out_channels": [8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
TEXT = {
    "width": 16,
    "layers": 1,
    "heads": 2,
    "intermediate_size": 32,
    "context_length": 32,
    "activation": "gelu",
    "projection_dim": 16,
}
IMAGE = {"timm_model": "test_convnext", "image_size": 64, "embed_dim": 16}
DIT = {"kind": "dit", "depth": 1, "width": 32, "heads": 2, "sample_size": 16}
UNET = {
    "kind": "unet",
    "block_out_channels": [16, 32],
    "layers_per_block": 1,
    "attention_levels": [False, True],
    "heads": 2,
    "norm_num_groups": 8,
}


LAUNCHERS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port"],  # and a free one
    "quiet": [str(BIN / "deepspeed"), "--log_level", "critical", "--num_gpus", "2", "--master_port"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"],
}


def start(
    words: list[str], *, launcher: str = "python", port: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a training command: by plain python, or in two processes by one of the LAUNCHERS or, much faster, as "ranks"
    that nobody launched. port: deepspeed's; a free one by default."""
    if launcher in ("python", "ranks"):
        return python_here().complete(*words, environment=variables, ranks=1 + (launcher == "ranks"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"} | variables
    command = [*LAUNCHERS[launcher], *([port or free_port()] if launcher != "torchrun" else []), *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


def write_config(folder: Path, name: str, shards: str, **sections: object) -> str:
    data = {"shards": [shards], "image_size": 64, "batch_size": 8, "lanes": 2, "prefetch": 1}
    sections.setdefault("optim", OPTIM)
    tree = {"run": RUN | {"name": name, "folder": str(folder / "runs")}, "data": data}
    tree |= {"validation": {"shards": shards, "batch_size": 8}} | sections
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def denoiser_config(folder: Path, name: str, shards: str, denoiser: dict[str, object], **model: object) -> str:
    model = {
        "vae": str(folder / "runs/vae"),
        "text": str(folder / "runs/clip"),
        "denoiser": denoiser,
        "path": {"kind": "rectified_flow"},
        "objective": {"prediction": "velocity"},
        "keep_latents": True,
    } | model
    preview = {"prompts": ["a red apple"], "pictures": 2, "steps": 2}
    return write_config(folder, name, shards, model=model, preview=preview, engine={"precision": "fp32"})


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]
