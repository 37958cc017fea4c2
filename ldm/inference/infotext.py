"""The text of a picture that AUTOMATIC1111's interface (A1111) reads, and draws the picture again from.

Its words are A1111's where it has a word for what was drawn; docs/interchange.md lists where it has none. The rules are
those of its modules infotext_utils, sd_samplers, sd_schedulers and processing, versions 1.9.4 and 1.10.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ldm.inference.options import PLAIN, DrawOptions
from ldm.inference.parameter import parameters
from ldm.inference.request import PictureSettings
from ldm.model.facts import STOCK
from ldm.samplers import SAMPLERS
from ldm.samplers.stock.grids import ON_THE_TABLE, WITH_AN_END
from ldm.samplers.stock.scheduler import LABELS

if TYPE_CHECKING:
    from ldm.inference.recipe import Recipe

# Our samplers that draw the picture of one of A1111's with another name.
SAME_PICTURE = {"ddpm": "Euler a"}
# A1111's samplers that have a time grid and a start of their own, whatever the text says of them.
WITH_OWN_GRID = ("DDIM", "PLMS", "UniPC")
# Our time grids, and the nearest schedule of A1111's. "SGM Uniform" is within 1.5 timesteps of trailing. Version 1.9
# lacks DDIM, Simple, KL Optimal and Align Your Steps, and takes its default for them.
SCHEDULES = {
    "trailing": "SGM Uniform",
    "linear": "Uniform",
    "quadratic": "Exponential",
    "karras": "Karras",
    "exponential": "Exponential",
    "log_snr": "Exponential",
    "beta": "Uniform",
    "leading": "DDIM",
    "align_your_steps": "Align Your Steps",
    "normal": "Uniform",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "ddim_uniform": "DDIM",
    "kl_optimal": "KL Optimal",
}
OTHER_SCHEDULE = "SGM Uniform"  # for times that were listed
SAME_GRIDS = (
    "trailing", "linear", "karras", "exponential", "log_snr", "normal", "sgm_uniform", "simple", "ddim_uniform",
)  # fmt: skip
_HASHED = re.compile(r"(.+) ([0-9a-f]{10})", re.DOTALL)
_LORA = re.compile(r"(.+?)(?::(-?[\d.]+(?:e[-+]?\d+)?))? (?:[0-9a-f]{10})?(?:, |$)", re.DOTALL)
_SUFFIX = re.compile(r"\.(safetensors|ckpt|pt|bin)$")


def parameters_text(recipe: Recipe) -> str:
    """Return A1111's text: the prompt, the negative prompt if there is one, and a last line of `key: value` pairs."""
    further = {
        **_vae_pairs(recipe.vae),
        "Denoising strength": recipe.strength,
        "Init image hash": recipe.init_image,
        "Mask hash": recipe.mask,
        "Scheduler": recipe.scheduler,
        "Text encoder": recipe.text,
    }
    pairs = {
        **_setting_pairs(recipe),
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": recipe.weights_hash,
        "Model": recipe.model,
        **{key: value for key, value in further.items() if value},
        **_drawing_pairs(recipe),
        **_option_pairs(recipe),
        "Lora hashes": _hashes([(alias, digest) for alias, _, digest in _loras(recipe)] + _named(recipe.prompt_loras)),
        "TI hashes": _hashes(_named(recipe.embeddings)),
        "Version": recipe.software,
    }
    pairs = {key: _quote(str(value)) for key, value in pairs.items() if value != ""}
    negative = f"\nNegative prompt: {recipe.negative_prompt}" if recipe.negative_prompt else ""
    return f"{_tagged_prompt(recipe)}{negative}\n{', '.join(f'{key}: {value}' for key, value in pairs.items())}"


def _setting_pairs(recipe: Recipe) -> dict[str, object]:
    """Return the settings that A1111 has names for, in its format, with the schedule after the sampler."""
    in_its_form = {"sampler": _sampler(recipe), "scale": repr(recipe.scale).removesuffix(".0")}
    known = {about.a1111: name for name, about in parameters(PictureSettings).items() if about.a1111}
    pairs: dict[str, object] = {}
    for key, name in known.items():
        pairs[key] = in_its_form.get(name, getattr(recipe, name))
        if name == "sampler":
            pairs[parameters(DrawOptions)["time_grid"].a1111] = SCHEDULES.get(_grid(recipe), OTHER_SCHEDULE)
    return pairs


def _sampler(recipe: Recipe) -> str:
    if recipe.sampler == STOCK:
        return LABELS[recipe.scheduler.split(", ")[0]]
    return SAME_PICTURE.get(recipe.sampler, SAMPLERS[recipe.sampler].label)


def _grid(recipe: Recipe) -> str:
    if recipe.sampler == STOCK:
        grid = recipe.scheduler.split(", ")[1]
        return "linear" if grid == "linspace" else grid
    return recipe.options.time_grid or recipe.default_grid or "trailing"  # the default before it was recorded


def _drawing_pairs(recipe: Recipe) -> dict[str, object]:
    """Return what A1111 has to be told so that its noise and its start are ours.

    Random numbers come from the CPU. Ours starts from noise of variance 1, theirs from sigma times that in their scale
    (variance sigma^2 rather than 1 + sigma^2), unless the noise multiplier is on; a drawing that starts from a picture
    adds noise in the same way in both.
    """
    multiplied = recipe.strength == 0 and _sampler(recipe) not in WITH_OWN_GRID and not _begins_without_data(recipe)
    text = recipe.prompt + recipe.negative_prompt
    plain = recipe.options.weighting == "none" and any(bracket in text for bracket in "([")
    told = {
        "Time grid": "" if _grid(recipe) in SAME_GRIDS else _grid(recipe),
        "RNG": "CPU",
        "SGM noise multiplier": "True" if multiplied else "",
        "Emphasis": "None" if plain else "",
    }
    return {key: value for key, value in told.items() if value}


def _begins_without_data(recipe: Recipe) -> bool:
    """Tell whether a model's own scheduler begins with sigma n, as A1111 does by default."""
    if recipe.sampler != STOCK:
        return False
    return recipe.scheduler.split(", ")[0] not in ON_THE_TABLE | WITH_AN_END and "leading" not in recipe.scheduler


def _option_pairs(recipe: Recipe) -> dict[str, object]:
    """Return the options that differ from their defaults, under A1111's names if there are any."""
    pairs: dict[str, object] = {}
    for name, about in parameters(DrawOptions).items():
        value = getattr(recipe.options, name)
        if name == "clip_skip":
            value = value or recipe.default_clip_skip or None
        if value != getattr(PLAIN, name) and name != "time_grid":
            key = about.a1111 or name.replace("_", " ").capitalize()
            key = "Eta DDIM" if (name, recipe.sampler) == ("eta", "ddim") else key
            pairs[key] = " to ".join(map(str, value)) if isinstance(value, tuple) else value
    return pairs


def _vae_pairs(vae: str) -> dict[str, object]:
    """Return the pairs of an autoencoder: A1111 finds a file by its name, and does not read folders."""
    if (found := _HASHED.fullmatch(vae)) is None:
        return {"Autoencoder": vae}
    return {"VAE hash": found[2], "VAE": found[1]}


def _tagged_prompt(recipe: Recipe) -> str:
    """Return the prompt with a tag for each LoRA that it does not name already."""
    tags = {f"<lora:{alias}:": f"{strength}>" for alias, strength, _ in _loras(recipe)}
    return recipe.prompt + "".join(tag + rest for tag, rest in tags.items() if tag not in recipe.prompt)


def _loras(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Yield each LoRA's name in A1111 (its file's, without what ends a name there), strength and hash ("": none)."""
    digests = recipe.lora_hashes.split(", ")
    for number, found in enumerate(_LORA.finditer(recipe.loras)):
        alias = re.sub(r"[:,<>\n]", "", _SUFFIX.sub("", found[1]))
        yield alias, found[2] or "1", digests[number] if number < len(digests) else ""


def _named(files: str) -> list[tuple[str, str]]:
    """Split "name:0.8 0123456789, other 9876543210" into names and hashes."""
    pairs = [file.rpartition(" ") for file in files.split(", ") if file]
    return [(name.partition(":")[0], digest) for name, _, digest in pairs]


def _hashes(pairs: Sequence[tuple[str, str]]) -> str:
    return ", ".join(f"{name}: {digest}" for name, digest in pairs if digest)


def _quote(value: str) -> str:
    # In addition to A1111's rule (, : and newline): its reader strips leading blanks, and unquotes what starts with ".
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n]|^["\s]', value) else value
