"""The result of a drawing: a picture, and the record of how to draw it again, which its PNG file contains.

Each PNG has two texts: `parameters`, which AUTOMATIC1111's interface (A1111) and compatible sites read, and `foundry`,
JSON with everything that is needed to draw the picture again (for a contact sheet, a list).
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.files.digest import short_hash
from ldm.inference.options import PLAIN, DrawOptions
from ldm.inference.parameter import parameters
from ldm.inference.pictures import picture_hash
from ldm.inference.request import OUR_SAMPLER, DrawRequest, PictureSettings
from ldm.interop.read_model import LoadOptions
from ldm.model.facts import STOCK, ModelFacts
from ldm.samplers import SAMPLERS
from ldm.samplers.stock import LABELS

if TYPE_CHECKING:
    from ldm.inference.pipeline import TextToImage

PARAMETERS, FOUNDRY = "parameters", "foundry"
NOT_FOLLOWED = "not followed: "  # begins a Recipe's scheduler


@dataclass(frozen=True, kw_only=True)
class Recipe(PictureSettings):
    """Everything that a picture depends on, as stored in its PNG."""

    model: str
    weights_hash: str  # first 10 hex digits of the SHA-256 of the denoiser's file
    device: str
    precision: str
    software: str
    # Older pictures do not have these.
    vae: str = ""  # a file's name, and the first 10 hex digits of its SHA-256; "" is none
    loras: str = ""  # "name:0.8 0123456789, other 9876543210"
    init_image: str = ""  # first 10 hex digits of the SHA-256 of the file that the drawing started from
    mask: str = ""
    strength: float = 0.0  # 0: it started from noise
    prediction: str = ""  # as given to load; "": the model's own
    scheduler: str = ""  # the stock scheduler that was followed, or why it was not; "" for a sampler by name
    ema: bool = True  # whether averaged weights were used, if the file had both


class Drawing(NamedTuple):
    """A picture, and how it was drawn."""

    image: Image.Image
    recipe: Recipe


def recorded(options: LoadOptions) -> dict[str, Any]:
    """Return what a model was loaded with as fields of a Recipe. The first call reads the complete files, to hash
    them."""
    loras = [f"{file.name}{'' if by == 1 else f':{by:g}'} {file_hash(file)}" for file, by in options.lora]
    vae = f"{options.vae.name} {file_hash(options.vae)}".strip() if options.vae else ""
    return {"vae": vae, "loras": ", ".join(loras), "prediction": options.prediction or "", "ema": options.ema}


def recipe_of(request: DrawRequest, pipe: TextToImage, image: Image.Image) -> Recipe:
    """Create the recipe of an image that a pipe drew for a checked request."""
    drawn = replace(request, width=image.width, height=image.height)
    settings = {name: about.kind(getattr(drawn, name)) for name, about in parameters(PictureSettings).items()}
    return Recipe(
        **settings | recorded(pipe.loaded_with),
        options=request.options,
        model=pipe.name,
        weights_hash=pipe.weights_hash,
        device=str(pipe.device),
        precision=pipe.precision,
        software=software(),
        init_image="" if request.image is None else picture_hash(request.image),
        mask="" if request.mask is None else picture_hash(request.mask),
        strength=float(request.strength or 0),
        scheduler=scheduler_of(request, pipe.facts),
    )


def scheduler_of(request: DrawRequest, facts: ModelFacts) -> str:
    """Describe the stock scheduler that a checked request follows, or the part of the folder's that is not followed."""
    if request.sampler == STOCK and facts.scheduler is not None:
        return facts.scheduler.describe()
    by_default = request.sampler == OUR_SAMPLER and request.options.grid is None
    return f"{NOT_FOLLOWED}{facts.unfollowed}" if facts.unfollowed and by_default else ""


def software() -> str:
    """Return this program's name and, if it is installed, its version."""
    try:
        return f"Latent Foundry {importlib.metadata.version('latent-foundry')}"
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "Latent Foundry"


@cache
def file_hash(path: Path) -> str:
    """Return the first 10 hex digits of a file's SHA-256; "" for a folder."""
    return short_hash([path]) if path.is_file() else ""


def parameters_text(recipe: Recipe) -> str:
    """Return A1111's text: the prompt, the negative prompt if there is one, and a last line of `key: value` pairs."""
    further = {
        "VAE": recipe.vae,
        "Lora": recipe.loras,
        "Denoising strength": recipe.strength,
        "Init image hash": recipe.init_image,
        "Mask hash": recipe.mask,
        "Scheduler": recipe.scheduler,
    }
    pairs = {
        **_setting_pairs(recipe),
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": recipe.weights_hash,
        "Model": recipe.model,
        **{key: value for key, value in further.items() if value},
        **_option_pairs(recipe.options),
        "Version": recipe.software,
    }
    negative = f"\nNegative prompt: {recipe.negative_prompt}" if recipe.negative_prompt else ""
    return f"{recipe.prompt}{negative}\n{', '.join(f'{key}: {_quote(str(value))}' for key, value in pairs.items())}"


def _setting_pairs(recipe: Recipe) -> dict[str, object]:
    """Return the settings that A1111 has names for, in its format."""
    sampler, grid = own_sampler(recipe)
    in_its_form = {"sampler": sampler, "scale": repr(recipe.scale).removesuffix(".0")}
    known = {name: about.a1111 for name, about in parameters(PictureSettings).items() if about.a1111}
    pairs: dict[str, object] = {key: in_its_form.get(name, getattr(recipe, name)) for name, key in known.items()}
    return pairs | ({"Schedule type": grid} if grid else {})


def own_sampler(recipe: Recipe) -> tuple[str, str]:
    """Return A1111's name of the sampler, and the grid of a stock scheduler, which no option names."""
    if recipe.sampler != STOCK:
        return SAMPLERS[recipe.sampler].label, ""
    kind, grid = recipe.scheduler.split(", ")[:2]
    return LABELS[kind], grid


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
