"""Write the model card, README.md of an export: the model, its training and its results."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch

from ldm.config import read_tree, to_yaml
from ldm.files.strict_json import json_lines
from ldm.interop.diffusers_layout.denoiser import layout_of
from ldm.interop.diffusers_layout.folder import NOTES, own_file
from ldm.interop.export_files import CARD
from ldm.interop.network_files import RUN_MODEL
from ldm.interop.ownership import RUN_CONFIG, files_of_run, ownership, section
from ldm.interop.published import published, published_card
from ldm.interop.weight_reader import FLOATS
from ldm.model.components import ModelComponents, Origin
from ldm.model.ownership import PublishConfig

SHEET = "assets/samples.png"
MAX_PICTURES, MAX_PICTURE_BYTES, MAX_METRICS_BYTES = 16, 2**26, 2**30

CARD_TEXT = Template("""---
${front}library_name: $library
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
$sources""")

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
        found = {str(file.relative_to(source)): own_file(source, file, most=MAX_PICTURE_BYTES) for file in files}
        return found | {CARD: published_card(found[CARD].decode(errors="replace")).encode()}
    run, step = source.resolve().parent if source.name == RUN_MODEL else source, _step(parts)
    sheets = sorted((run / "samples").glob("step_*.png")) if length is None else []
    if step is not None:  # a sheet that other weights have drawn is not this model's
        sheets = [sheet for sheet in sheets if sheet.stem == f"step_{step:07d}"]
    records = read_records(run) if length is None else []
    files = files_of_run(run)
    card = model_card(
        parts, name=name, dtype=dtype, records=records, has_sheet=bool(sheets), length=length,
        files=sorted(files | ownership(parts).files),
    )  # fmt: skip
    if not ownership(parts).publish.license and (run / RUN_CONFIG).exists():
        warnings.warn(
            f"the model card of {name} names no licence: write one into its {CARD}, which later exports keep, or train "
            "with publish.license",
            stacklevel=2,
        )
    pictures = {SHEET: own_file(run, sheets[-1], most=MAX_PICTURE_BYTES)} if sheets else {}
    return files | {CARD: card.encode()} | pictures


def _step(parts: ModelComponents) -> int | None:
    """Return which step of a training the weights are of, if it is known."""
    return None if parts.origin is None else parts.origin.step


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
    files: Sequence[str] = (),
) -> str:
    """Return the text, without unknown facts of the training.

    dtype: of the weights as written. length: of the average, if it is not the run's own. files: of licences beside it.
    """
    config, whose = _training_config(published(parts.notes)), ownership(parts)
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
        sheet=_sheet(config, _step(parts)) if has_sheet else "",
        in_diffusers=in_diffusers if layout.library == "diffusers" else "",
        beginning=", image=image, mask=mask" * parts.for_inpainting,
        words=" --init-img photo.png --mask mask.png" * parts.for_inpainting,
        training=_training(config, parts.origin, list(records), length) if config else "",
        size=size,
        front=_front_matter(whose.publish),
        sources=_sources(whose.publish, files) if config or not whose.publish.is_empty else "",
    )


def _front_matter(publish: PublishConfig) -> str:
    """Return the lines of the Hub's metadata that say whose the model is."""
    known = section(publish) or {}
    return "".join(to_yaml({key: known[key]}) for key in ("license", "base_model", "datasets") if key in known)


def _sources(publish: PublishConfig, files: Sequence[str]) -> str:
    """Say whose the model is and what it was trained on; files: those that must be kept with the weights."""
    stated = (
        f"The weights are under `{publish.license}`." if publish.license else "No licence is stated for the weights."
    )
    lines = [stated]
    if publish.base_model:
        lines.append(f"Training started from the weights of {publish.base_model}.")
    if publish.pictures:
        of = f" of {', '.join(publish.datasets)}" if publish.datasets else ""
        lines.append(f"It was trained on {publish.pictures:,} pictures{of}.")
    if files:
        lines.append(f"Keep {', '.join(f'`{name}`' for name in files)} next to the weights when you pass them on.")
    credits = "".join(f"- {credit.replace(chr(10), chr(10) + '  ')}\n" for credit in publish.credits)
    return f"\n## Sources and licence\n\n{' '.join(lines)}\n" + (f"\n{credits}" if credits else "")


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


def _sheet(config: dict[str, Any] | None, step: int | None) -> str:
    if config is None or not config.get("preview"):
        return f"![Drawings of the model]({SHEET})\n\n"
    preview = config["preview"]
    rows = "".join(f"- {prompt}\n" for prompt in preview["prompts"])
    ended = step in (None, config["run"]["steps"])
    when = "at the end of training" if ended else f"at step {step}, where it was stopped"
    return (
        f"![Drawings of the model]({SHEET})\n\nDrawn {when}, one row per prompt, "
        f"{preview['pictures']} seeds from {preview['seed']} on, not cherry-picked ({preview['sampler']}, "
        f"{preview['steps']} steps, scale {preview['scale']:g}):\n\n{rows}\n"
    )


def _training(
    config: dict[str, Any], origin: Origin | None, records: list[dict[str, Any]], length: float | None
) -> str:
    data, optim, model = config["data"], config["optim"], config["model"]
    steps = max((record["step"] for record in records), default=config["run"]["steps"])
    seen = None
    if origin is not None and origin.step is not None:
        steps, seen = origin.step, origin.samples_seen
        records = [record for record in records if record["step"] <= steps]
    seen = steps * data["batch_size"] if seen is None else seen
    patterns = [one["shards"] for one in data.get("sets") or ()] or [data["shards"]]
    rows = {
        "pictures": ", ".join(f"`{shards}`" for own in patterns for shards in _listed(own))
        + f", {data['image_size']} pixels per side",
        "steps": f"{steps} of {data['batch_size']} pictures: {seen:,} pictures seen",
        "learning rate": f"{optim['lr']:g}, {optim['schedule']}, {_optimizer(optim)}",
        "averaged weights": f"EMA {optim['ema_decay']:g}" if length is None else f"of relative length {length:g}",
        "captions left out": f"{model['caption_dropout']:.0%}, for guidance",
    }
    if model.get("start"):
        rows["started from"] = str(model["start"])
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    text = f"## Training\n\n| | |\n|---|---|\n{table}\n\nThe complete configuration is in `{NOTES}`.\n\n"
    measured = [record for record in records if "held_out_loss" in record]
    return text + (_held_out(config, measured, steps) if measured else "")


def _held_out(config: dict[str, Any], measured: list[dict[str, Any]], steps: int) -> str:
    """Write what was measured on held-out images; of other weights than these, it is said."""
    first, last = measured[0], measured[-1]
    shards = ", ".join(_listed((config.get("validation") or {}).get("shards", ())))
    text = (
        f"The error on held-out images ({shards}) was {last['held_out_loss']:.4f} at step "
        f"{last['step']}, {first['held_out_loss']:.4f} at step {first['step']}: the mean of the objective over "
        "times, unweighted, with the averaged weights."
    )
    later = f" These weights are of step {steps}, at which it was not measured." if last["step"] != steps else ""
    return f"{text}{later}\n\n"


def _optimizer(optim: dict[str, Any]) -> str:
    adamw = f"AdamW {tuple(optim['betas'])}"
    if optim.get("optimizer", "adamw") == "adamw":
        return adamw
    return f"Muon (momentum {optim['muon_momentum']:g}) for linear layers, {adamw} for all others"


def _listed(shards: str | Sequence[str]) -> Sequence[str]:
    return (shards,) if isinstance(shards, str) else shards
