"""Check whether two checkouts draw the same pictures and train the same weights, bit for bit, on this CPU.

    git worktree add ../before COMMIT
    python benchmarks/same_results.py ../before before.json
    python benchmarks/same_results.py . after.json --against before.json

Everything goes through the commands that users type, so versions with different modules can be compared. Compared are
pixels (12 prompts x 4 samplers, guidance's variants, image to image, inpainting), losses and checkpointed weights
(100 steps of a DiT and a U-Net under ZeRO 0 and 2, one of them on two ranks, one resumed; a VAE and a CLIP of 20 steps)
and the weights of exports. About seven minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

PROMPTS = (
    "a noto emoji of Santa Claus, medium skin tone", "a twemoji emoji of red apple", "a noto emoji of flag of Japan",
    "a twemoji emoji of dog face", "a noto emoji of woman surfing, dark skin tone", "a twemoji emoji of fire engine",
    "a noto emoji of pizza", "a twemoji emoji of sunflower", "a noto emoji of cat face", "a twemoji emoji of man cook",
    "a noto emoji of rainbow", "",
)  # fmt: skip
SAMPLERS = ("dpmpp_2m", "ddim", "euler_ancestral", "heun")
VARIANTS: dict[str, list[str]] = {
    "rescaled": ["--guidance-rescale", "0.7"],
    "projected": ["--guidance-parallel", "0", "--guidance-norm-limit", "5", "--guidance-momentum", "-0.5"],
    "interval": ["--guidance-interval", "0.1", "0.8", "--guidance-schedule", "cosine"],
    "weighted": ["--weighting", "a1111", "--time-grid", "karras"],
    "image": ["--init-img", "init.png", "--strength", "0.6"],
    "masked": ["--init-img", "init.png", "--mask", "mask.png", "--sampler", "dpmpp_2m_sde"],
    "negative": ["--neg", "a red apple", "--scale", "3"],
}
SMALL = ["run.log_every=1", "run.sample_every=100", "run.checkpoint_every=50", "data.batch_size=16",
         "engine.precision=fp32", "validation.batch_size=64", "preview.pictures=1", "preview.steps=4"]  # fmt: skip
UNET = ["model.denoiser={kind: unet, block_out_channels: [32, 64], layers_per_block: 1, attention_levels: "
        "[false, true], heads: 4, norm_num_groups: 8}"]  # fmt: skip
TINY = ["run.steps=20", "run.log_every=1", "run.sample_every=20", "run.checkpoint_every=20", "data.batch_size=16"]
DIGITS = 16


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:DIGITS]


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return str(image.size).encode() + image.convert("RGB").tobytes()


class Checkout:
    """Runs a checkout's commands with this Python, in a temporary folder."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = root.resolve(), folder
        self.environment = os.environ | {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "2"}

    def run(self, *words: str, program: tuple[str, ...] = (sys.executable,), threads: int = 2) -> None:
        done = subprocess.run(
            [*program, *words], cwd=self.root, env=self.environment | {"OMP_NUM_THREADS": str(threads)},
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")

    def draw(self, name: str, *words: str) -> dict[str, str]:
        out = self.folder / name
        self.run("txt2img.py", "--skip-grid", "--outdir", str(out), *words)
        return {f"{name}/{path.stem}": digest(pixels(path)) for path in sorted(out.rglob("*.png"))}

    def train(self, name: str, script: str, config: str, *words: str, ranks: int = 1) -> dict[str, str]:
        program = (sys.executable,)
        if ranks > 1:
            launcher = str(Path(sys.executable).with_name("deepspeed"))
            program = (launcher, "--num_gpus", str(ranks), "--log_level", "error")
        places = [f"run.folder={self.folder}", f"run.name={name}"]
        self.run(script, "--config", config, *places, *words, program=program, threads=2 // ranks)
        return dict(self.facts_of_run(name))

    def facts_of_run(self, name: str) -> Iterator[tuple[str, str]]:
        run = self.folder / name
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        timed = {"time", "images_per_second", "data_wait"}
        kept = [{key: value for key, value in record.items() if key not in timed} for record in records]
        yield f"{name}/metrics", digest(json.dumps(kept).encode())
        for path in sorted((run / "samples").glob("*.png")):
            yield f"{name}/{path.name}", digest(pixels(path))
        for path in sorted(run.rglob("*.safetensors")):
            if "checkpoints" not in path.parts or path.parent.name == max(os.listdir(run / "checkpoints"), key=order):
                yield f"{name}/{path.relative_to(run)}", weights(path)


def order(name: str) -> str:
    return name if name.startswith("step_") else ""


def weights(path: Path) -> str:
    """All tensors of a file but the random generators' states, which a library may have moved."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        keys = sorted(key for key in file.keys() if not key.startswith("generators/"))  # noqa: SIM118 - no dictionary
        return digest(*(part for key in keys for part in (key.encode(), _bytes(file.get_tensor(key)))))


def _bytes(tensor: object) -> bytes:
    import torch

    assert isinstance(tensor, torch.Tensor)
    return (
        f"{tensor.dtype} {tuple(tensor.shape)}".encode()
        + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    )


def drawings(checkout: Checkout) -> dict[str, str]:
    prompts = checkout.folder / "prompts.txt"
    prompts.write_text("".join(f'--prompt "{prompt}"\n' for prompt in PROMPTS))
    common = ["--from-file", str(prompts), "--n-samples", "1", "--seed", "7", "--steps", "8"]
    found: dict[str, str] = {}
    for sampler in SAMPLERS:
        found |= checkout.draw(sampler, *common, "--sampler", sampler)
    first = sorted((checkout.folder / "dpmpp_2m" / "samples").glob("*.png"))[0]
    with Image.open(first) as image:
        image.convert("RGB").save(checkout.folder / "init.png")
        mask = Image.new("L", image.size, 0)
        mask.paste(255, (16, 16, 48, 40))
        mask.save(checkout.folder / "mask.png")
    few = ["--prompt", "a (twemoji:1.2) emoji of [red] apple", "--n-samples", "3", "--seed", "3", "--steps", "8"]
    for name, words in VARIANTS.items():
        own = [str(checkout.folder / word) if word.endswith(".png") else word for word in words]
        found |= checkout.draw(name, *few, *own)
    return found


def trainings(checkout: Checkout) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, denoiser in (("dit", ["run.steps=100"]), ("unet", [*UNET, "run.steps=100"])):
        for stage in (0, 2):
            words = [*SMALL, *denoiser, f"engine.zero_stage={stage}"]
            found |= checkout.train(f"{name}_zero{stage}", "ldm/train.py", "configs/demo.yaml", *words)
    two = [*SMALL, "run.steps=30", "run.sample_every=30", "engine.zero_stage=2", "optim.ema_lengths=[0.05,0.1]"]
    found |= checkout.train("two_ranks", "ldm/train.py", "configs/demo.yaml", *two, ranks=2)
    for steps in (40, 80):
        found |= checkout.train("resumed", "ldm/train.py", "configs/demo.yaml", *SMALL, f"run.steps={steps}")
    objective = "{prediction: eps, learned_variance: true, time_sampling: importance, offset_noise: 0.1}"
    learned = ["model.path={kind: scaled_linear_beta}", f"model.objective={objective}", "run.steps=40",
               "preview.sampler=ddpm_learned"]  # fmt: skip
    found |= checkout.train("learned", "ldm/train.py", "configs/demo.yaml", *SMALL, *learned)
    found |= checkout.train("vae", "vae/train.py", "configs/emoji64_vae.yaml", *TINY)
    found |= checkout.train("clip", "text/train.py", "configs/emoji64_clip.yaml", *TINY)
    return found


def exports(checkout: Checkout) -> dict[str, str]:
    found: dict[str, str] = {}
    runs = {"shipped": "weights/emoji64", "run": str(checkout.folder / "dit_zero0")}
    targets = {"shipped": [], "run": ["--fp16"]}
    for name, source in runs.items():
        target = checkout.folder / f"export_{name}"
        checkout.run("-m", "ldm.export", source, str(target), *targets[name])
        for path in sorted(target.rglob("*")):
            if path.suffix in (".safetensors", ".json", ".txt"):
                read: Callable[[Path], str] = weights if path.suffix == ".safetensors" else _text
                found[f"export_{name}/{path.relative_to(target)}"] = read(path)
    return found


def _text(path: Path) -> str:
    return digest(path.read_bytes())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("out", type=Path, help="the digests, as JSON")
    parser.add_argument("--against", type=Path, help="digests of before, which must be the same")
    parser.add_argument("--only", choices=("drawings", "trainings", "exports"), action="append")
    args = parser.parse_args()
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkout = Checkout(args.checkout, Path(folder))
        for part in (drawings, trainings, exports):
            if not args.only or part.__name__ in args.only:
                found |= part(checkout)
                print(f"{part.__name__}: {len(found)} digests so far", flush=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.against is None:
        return 0
    before = json.loads(args.against.read_text())
    differ = [name for name in found if before.get(name) != found[name]]
    for name in differ:
        print(f"differs: {name}: {before.get(name)} -> {found[name]}")
    print(f"{len(found) - len(differ)} of {len(found)} digests are the same")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
