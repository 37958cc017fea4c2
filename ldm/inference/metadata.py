"""PNG files that contain the recipe of their picture.

Each PNG has two texts: `parameters`, which AUTOMATIC1111's interface (A1111) and compatible sites read, and `foundry`,
JSON with everything that is needed to draw the picture again (for a contact sheet, a list).
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.inference.options import PLAIN, DrawOptions
from ldm.inference.parameter import parameters
from ldm.inference.recipe import Recipe
from ldm.inference.request import PictureSettings
from ldm.samplers import SAMPLERS

PARAMETERS, FOUNDRY = "parameters", "foundry"


def parameters_text(recipe: Recipe) -> str:
    """Return A1111's text: the prompt, the negative prompt if there is one, and a last line of `key: value` pairs."""
    pairs = {
        **_setting_pairs(recipe),
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": recipe.weights_hash,
        "Model": recipe.model,
        **{key: value for key, value in _further_pairs(recipe).items() if value},
        **_option_pairs(recipe.options),
        "Version": recipe.software,
    }
    negative = f"\nNegative prompt: {recipe.negative_prompt}" if recipe.negative_prompt else ""
    return f"{recipe.prompt}{negative}\n{', '.join(f'{key}: {_quote(str(value))}' for key, value in pairs.items())}"


def _setting_pairs(recipe: Recipe) -> dict[str, object]:
    """Return the settings that A1111 has names for, in its format."""
    in_its_form = {"sampler": SAMPLERS[recipe.sampler].label, "scale": repr(recipe.scale).removesuffix(".0")}
    known = {name: about.a1111 for name, about in parameters(PictureSettings).items() if about.a1111}
    return {key: in_its_form.get(name, getattr(recipe, name)) for name, key in known.items()}


def _further_pairs(recipe: Recipe) -> dict[str, object]:
    return {
        "VAE": recipe.vae,
        "Lora": recipe.loras,
        "Denoising strength": recipe.strength,
        "Init image hash": recipe.init_image,
        "Mask hash": recipe.mask,
    }


def _option_pairs(options: DrawOptions) -> dict[str, object]:
    """Return the options that differ from their defaults, under A1111's names if there are any."""
    pairs: dict[str, object] = {}
    for name, about in parameters(DrawOptions).items():
        value = getattr(options, name)
        if value != getattr(PLAIN, name):
            key = about.a1111 or name.replace("_", " ").capitalize()
            pairs[key] = " to ".join(map(str, value)) if isinstance(value, tuple) else value
    return pairs


def _quote(value: str) -> str:
    # In addition to A1111's rule (, : and newline): its reader strips leading blanks, and unquotes what starts with ".
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n]|^["\s]', value) else value


def png_bytes(image: Image.Image, recipes: Sequence[Recipe]) -> bytes:
    """Encode a PNG file of a picture with its recipe, or of a contact sheet with those of its pictures in order.

    The same picture and recipes give the same bytes. A sheet's `parameters` are its first picture's, as in A1111.
    """
    info = PngInfo()
    info.add_text(PARAMETERS, parameters_text(recipes[0]))
    items = [asdict(recipe) for recipe in recipes]
    info.add_text(FOUNDRY, json.dumps(items[0] if len(items) == 1 else items))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def read_recipes(path: Path) -> list[Recipe]:
    """Read the recipes from a PNG written by png_bytes. Raises ValueError or OSError if it has no valid ones."""
    with Image.open(path, formats=["PNG"]) as image:
        image.load()  # texts may also follow the pixels
        text = image.info.get(FOUNDRY)
    if text is None:
        raise ValueError(f"{path} has no text {FOUNDRY!r}: give a PNG that this program drew, with its metadata")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the text {FOUNDRY!r} is not JSON: give a PNG as it was written") from error
    return [_recipe(item, path) for item in (content if isinstance(content, list) else [content])]


def _recipe(item: Any, path: Path) -> Recipe:
    kinds = _kinds()
    found = {key: value for key, value in item.items() if key != "options"} if isinstance(item, dict) else {}
    if not _needed() <= found.keys() or any(type(value) is not kinds.get(key) for key, value in found.items()):
        raise ValueError(
            f"{path}: the text {FOUNDRY!r} is not a recipe, expected {', '.join(kinds)}: give a PNG as it was written"
        )
    try:
        options: dict[str, Any] = dict(item.get("options", {}))
        options["guidance_interval"] = tuple(options.get("guidance_interval", PLAIN.guidance_interval))
        return Recipe(**found, options=DrawOptions(**options))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the text {FOUNDRY!r} has invalid options ({error}): give another") from error


def _kinds() -> dict[str, object]:
    """Return the type of each key of a recipe in JSON, except its options."""
    kinds = get_type_hints(Recipe) | {name: about.kind for name, about in parameters(PictureSettings).items()}
    return {name: kind for name, kind in kinds.items() if name != "options"}


def _needed() -> set[str]:
    """Return the keys that every recipe has; older pictures do not have the others."""
    return {entry.name for entry in fields(Recipe) if entry.default is MISSING} | parameters(PictureSettings).keys()
