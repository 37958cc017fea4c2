"""The result of a drawing: a picture, and the record of how to draw it again, which its PNG file contains.

Each PNG has two texts: `parameters`, which AUTOMATIC1111's interface (A1111) and compatible sites read, and `foundry`,
JSON with everything that is needed to draw the picture again (for a contact sheet, a list).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.files.digest import sha256_of, short_hash
from ldm.inference.infotext import parameters_text
from ldm.inference.options import PLAIN, DrawOptions
from ldm.inference.parameter import parameters
from ldm.inference.pictures import picture_hash
from ldm.inference.request import OUR_SAMPLER, DrawRequest, PictureSettings
from ldm.interop.lora import lora_files
from ldm.interop.read_model import LoadOptions
from ldm.interop.weight_reader import open_weights
from ldm.model.facts import STOCK, ModelFacts

if TYPE_CHECKING:
    from ldm.inference.pipeline import TextToImage

PARAMETERS, FOUNDRY = "parameters", "foundry"
NOT_FOLLOWED = "not followed: "  # begins a Recipe's scheduler
LONGER_DIGITS = 12  # of a LoRA's hash in A1111


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
    lora_hashes: str = ""  # by which A1111 finds them, in the same order: "0123456789ab, ba9876543210"
    init_image: str = ""  # first 10 hex digits of the SHA-256 of the file that the drawing started from
    mask: str = ""  # likewise, or "transparency" if that of the initial image was the mask
    init_size: str = ""  # width x height of the initial image: if they are not the picture's own, it was scaled
    strength: float = 0.0  # 0: it started from noise
    prediction: str = ""  # as given to load; "": the model's own
    scheduler: str = ""  # the stock scheduler that was followed, or why it was not; "" for a sampler by name
    text: str = ""  # the text encoder's file, as vae
    ema: bool = True  # whether averaged weights were used, if the file had both
    default_grid: str = ""  # the time grid of this model's path, used where the options name none
    default_clip_skip: int = 0  # this model's own, used where the options name none; 0: what programs assume of it
    prompt_loras: str = ""  # those that the prompt names and that were found: "name:0.8 0123456789ab"
    embeddings: str = ""  # those that the prompts use: "name 0123456789, other 9876543210"
    remarks: str = ""  # what was not drawn as it was asked for, a line each


class Drawing(NamedTuple):
    """A picture, and how it was drawn."""

    image: Image.Image
    recipe: Recipe


def recorded(options: LoadOptions) -> dict[str, Any]:
    """Return what a model was loaded with as fields of a Recipe. The first call reads the complete files, to hash
    them."""
    loras = [f"{path.name}{'' if by == 1 else f':{by:g}'} {files_hash(path)}" for path, by in options.lora]
    vae, text = (f"{part.name} {file_hash(part)}".strip() if part else "" for part in (options.vae, options.text))
    return {
        "vae": vae,
        "text": text,
        "loras": ", ".join(loras),
        "lora_hashes": ", ".join(lora_hash(file) for file, _ in options.lora),
        "prediction": options.prediction or "",
        "ema": options.ema,
    }


def recipe_of(request: DrawRequest, pipe: TextToImage, image: Image.Image) -> Recipe:
    """Create the recipe of an image that a pipe drew for a checked request."""
    drawn = replace(request, width=image.width, height=image.height)
    words = pipe.named_in(request)
    settings = {name: about.kind(getattr(drawn, name)) for name, about in parameters(PictureSettings).items()}
    hashes = {"prompt_loras": lora_hash, "embeddings": embedding_hash}
    named: dict[str, Any] = {}
    for key, own in words.items():
        named[key] = ", ".join(f"{name} {hashes[key](file)}" for name, file in own)
    return Recipe(
        **settings | recorded(pipe.loaded_with) | named,
        options=request.options,
        model=pipe.name,
        weights_hash=pipe.weights_hash,
        device=str(pipe.device),
        precision=pipe.precision,
        software=software(),
        init_image="" if request.image is None else picture_hash(request.image),
        mask="" if request.mask is None else picture_hash(request.mask),
        init_size="" if request.image is None else "{} x {}".format(*request.image.size),
        strength=float(request.strength or 0),
        scheduler=scheduler_of(request, pipe.facts),
        default_grid=pipe.facts.path.default_grid if pipe.facts.path else "",
        default_clip_skip=pipe.facts.unusual_clip_skip,
        remarks="\n".join(request.remarks),
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


@cache
def embedding_hash(path: Path) -> str:
    """Return the first 12 hex digits of a file's SHA-256, as A1111 records embeddings."""
    return sha256_of(path)[:LONGER_DIGITS]


@cache
def files_hash(path: Path) -> str:
    """Return the first 10 hex digits of the SHA-256 of a LoRA: its file, or the files of its folder."""
    return short_hash(lora_files(path))


@cache
def lora_hash(path: Path) -> str:
    """Return the hash by which A1111 finds a LoRA: the first 12 hex digits of the SHA-256 of a safetensors file without
    its header, or of any other file; "" for a folder.

    The file may state it, as kohya's do. Rule: kohya-ss/sd-scripts, library/train_util.py, addnet_hash_safetensors;
    A1111, extensions-builtin/Lora/network.py.
    """
    if not path.is_file():
        return ""
    stated = open_weights(path).metadata.get("sshs_model_hash", "")[:LONGER_DIGITS]
    if re.fullmatch(f"[0-9a-f]{{{LONGER_DIGITS}}}", stated):
        return stated
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if path.suffix == ".safetensors":
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()[:LONGER_DIGITS]


def png_texts(recipes: Sequence[Recipe]) -> dict[str, str]:
    """Return the texts of a PNG file of a picture with its recipe, or of a contact sheet with those of its pictures."""
    items = [asdict(recipe) for recipe in recipes]
    return {PARAMETERS: parameters_text(recipes[0]), FOUNDRY: json.dumps(items[0] if len(items) == 1 else items)}


def png_info(texts: Mapping[Any, Any]) -> PngInfo:
    """Return what Pillow writes into a PNG file: the record among these texts, by their names."""
    info = PngInfo()
    for name in (PARAMETERS, FOUNDRY):
        if name in texts:
            info.add_text(name, texts[name])
    return info


def png_bytes(image: Image.Image, recipes: Sequence[Recipe]) -> bytes:
    """Encode a PNG file of a picture with its recipe, or of a contact sheet with those of its pictures in order.

    The same picture and recipes give the same bytes. A sheet's `parameters` are its first picture's, as in A1111.
    """
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=png_info(png_texts(recipes)))
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
