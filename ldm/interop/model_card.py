"""Write the model card, README.md of an export: the model, its training and its results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch

from ldm.config import read_tree
from ldm.files.strict_json import json_lines
from ldm.interop.diffusers_layout.denoiser import layout_of
from ldm.interop.diffusers_layout.folder import NOTES, own_file
from ldm.interop.network_files import RUN_MODEL
from ldm.interop.weight_reader import FLOATS
from ldm.model.components import ModelComponents

CARD, SHEET = "README.md", "assets/samples.png"
MAX_PICTURES, MAX_PICTURE_BYTES, MAX_METRICS_BYTES = 16, 2**26, 2**30

CARD_TEXT = Template("""---
library_name: $library
pipeline_tag: text-to-image
tags:
- text-to-image
- $library
- latent-foundry
---

# $name

$what

$sheet## Use

${in_diffusers}In Latent Foundry: `python txt2img.py --ckpt $name --prompt "$prompt"$words`, or

```python
from ldm import TextToImage
$opened
images = TextToImage.load("$name")("$prompt", steps=30, scale=5.0, seed=7, n=4$beginning)
```

$training## Limits

It draws $size x $size pixels; it was not trained for other sizes. It knows only what its training images show, in the
words of their captions, and has their biases.
""")

IN_DIFFUSERS = Template("""In diffusers:

```python
import torch
from diffusers import DiffusionPipeline
$opened
pipe = DiffusionPipeline.from_pretrained("$name", torch_dtype=torch.float32)
image = pipe("$prompt", num_inference_steps=30, guidance_scale=5.0$extra).images[0]
```

$note""")
OPENED = """from PIL import Image

image, mask = Image.open("photo.png"), Image.open("mask.png")
"""


def files_beside(
    parts: ModelComponents, source: Path, *, name: str, dtype: torch.dtype, length: float | None = None
) -> dict[str, bytes]:
    """Return the card and its images, by their path in the export.

    source: the run, its model, or another export, whose own card is copied if it has one. length: of an average
    reconstructed for this export, for which the run's samples and measures do not hold.
    """
    if (source / CARD).is_file() and not (source / RUN_MODEL).exists():
        files = [source / CARD, *sorted((source / "assets").glob("*.png"))[:MAX_PICTURES]]
        return {str(file.relative_to(source)): own_file(source, file, most=MAX_PICTURE_BYTES) for file in files}
    run = source.resolve().parent if source.name == RUN_MODEL else source
    sheets = sorted((run / "samples").glob("step_*.png")) if length is None else []
    records = read_records(run) if length is None else []
    card = model_card(parts, name=name, dtype=dtype, records=records, has_sheet=bool(sheets), length=length)
    pictures = {SHEET: own_file(run, sheets[-1], most=MAX_PICTURE_BYTES)} if sheets else {}
    return {CARD: card.encode()} | pictures


def read_records(run: Path) -> list[dict[str, Any]]:
    """Read the lines of a run's metrics.jsonl that have a step; none if the file does not exist."""
    text = own_file(run, run / "metrics.jsonl", most=MAX_METRICS_BYTES).decode(errors="replace")
    return [record for record in json_lines(text) if isinstance(record.get("step"), int)]


def model_card(
    parts: ModelComponents,
    *,
    name: str,
    dtype: torch.dtype = torch.float32,
    records: Iterable[dict[str, Any]] = (),
    has_sheet: bool = False,
    length: float | None = None,
) -> str:
    """Return the text, without unknown facts of the training.

    dtype: of the weights as written. length: of the average, if it is not the run's own.
    """
    config = _training_config(parts.notes)
    prompts = config["preview"]["prompts"] if config and config.get("preview") else ("a red apple",)
    size = parts.sample_size * parts.model.vae.config.factor
    layout = layout_of(parts.config)
    common = {
        "name": name,
        "prompt": prompts[0].replace('"', "'"),
        "opened": OPENED if parts.for_inpainting else "",
    }
    extra = layout.call_words(
        size=size, context_length=parts.model.conditioner.context_length, for_inpainting=parts.for_inpainting
    )
    in_diffusers = IN_DIFFUSERS.substitute(common, extra=extra, note=layout.call_note)
    return CARD_TEXT.substitute(
        common,
        library=layout.library.replace("_", "-"),
        what=_what(parts, size) + ("" if dtype == torch.float32 else f" Its weights were rounded to {FLOATS[dtype]}."),
        sheet=_sheet(config) if has_sheet else "",
        in_diffusers=in_diffusers if layout.library == "diffusers" else "",
        beginning=", image=image, mask=mask" * parts.for_inpainting,
        words=" --init-img photo.png --mask mask.png" * parts.for_inpainting,
        training=_training(config, list(records), length) if config else "",
        size=size,
    )


def _training_config(notes: str) -> dict[str, Any] | None:
    """Parse the configuration of a run of ldm/train.py; None for empty notes, or those of another program."""
    tree = read_tree(notes)
    sections = [tree.get(name) for name in ("run", "data", "model", "optim")]  # the others may be left out
    return tree if all(isinstance(section, dict) for section in sections) else None


def _what(parts: ModelComponents, size: int) -> str:
    count = sum(parameter.numel() for parameter in parts.denoiser.parameters())
    model, text = parts.model, parts.model.conditioner.encoders[0].config
    kind = parts.config.describe(model.conditioner.width)
    return (
        f"A text-to-image model: {kind} ({count / 1e6:.1f} M parameters), which predicts {model.prediction} on path "
        f"{model.path.kind}, in the latents of a KL autoencoder (1/{model.vae.config.factor} of the image's side, "
        f"{model.vae.config.latent_channels} channels), conditioned on a CLIP text encoder of {text.layers} "
        f"layers, {text.width} wide. Its images have {size} x {size} pixels. Made with Latent Foundry."
    )


def _sheet(config: dict[str, Any] | None) -> str:
    if config is None or not config.get("preview"):
        return f"![Drawings of the model]({SHEET})\n\n"
    preview = config["preview"]
    rows = "".join(f"- {prompt}\n" for prompt in preview["prompts"])
    return (
        f"![Drawings of the model]({SHEET})\n\nDrawn at the end of training, one row per prompt, "
        f"{preview['pictures']} seeds from {preview['seed']} on, not cherry-picked ({preview['sampler']}, "
        f"{preview['steps']} steps, scale {preview['scale']:g}):\n\n{rows}\n"
    )


def _training(config: dict[str, Any], records: list[dict[str, Any]], length: float | None) -> str:
    data, optim, model = config["data"], config["optim"], config["model"]
    steps = max((record["step"] for record in records), default=config["run"]["steps"])
    patterns = [one["shards"] for one in data.get("sets") or ()] or [data["shards"]]
    rows = {
        "pictures": ", ".join(f"`{shards}`" for own in patterns for shards in _listed(own))
        + f", {data['image_size']} pixels per side",
        "steps": f"{steps} of {data['batch_size']} pictures: {steps * data['batch_size']:,} pictures seen",
        "learning rate": f"{optim['lr']:g}, {optim['schedule']}, {_optimizer(optim)}",
        "averaged weights": f"EMA {optim['ema_decay']:g}" if length is None else f"of relative length {length:g}",
        "captions left out": f"{model['caption_dropout']:.0%}, for guidance",
    }
    if model.get("start"):
        rows["started from"] = f"`{model['start']}`"
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    text = f"## Training\n\n| | |\n|---|---|\n{table}\n\nThe complete configuration is in `{NOTES}`.\n\n"
    measured = [record for record in records if "held_out_loss" in record]
    if measured:
        first, last, held_out = measured[0], measured[-1], config.get("validation") or {}
        shards = ", ".join(_listed(held_out.get("shards", ())))
        text += (
            f"The error on held-out images ({shards}) was {last['held_out_loss']:.4f} at step "
            f"{last['step']}, {first['held_out_loss']:.4f} at step {first['step']}: the mean of the objective over "
            "times, unweighted, with the averaged weights.\n\n"
        )
    return text


def _optimizer(optim: dict[str, Any]) -> str:
    adamw = f"AdamW {tuple(optim['betas'])}"
    if optim.get("optimizer", "adamw") == "adamw":
        return adamw
    return f"Muon (momentum {optim['muon_momentum']:g}) for linear layers, {adamw} for all others"


def _listed(shards: str | Sequence[str]) -> Sequence[str]:
    return (shards,) if isinstance(shards, str) else shards
