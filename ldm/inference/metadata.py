"""Pictures that tell how they were drawn, in files that never replace others.

Each PNG carries two texts: `parameters`, which AUTOMATIC1111's interface (A1111) and the sites that follow it read, and
`foundry`, JSON with all that is needed to draw the picture again (for a sheet of pictures: a list of it).
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, get_type_hints

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldm.files.atomic import write_new
from ldm.inference.options import PLAIN, DrawOptions
from ldm.samplers import SAMPLERS

PARAMETERS, FOUNDRY = "parameters", "foundry"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that a picture depends on."""

    prompt: str
    negative_prompt: str
    steps: int
    scale: float
    sampler: str  # a key of SAMPLERS
    seed: int  # of this picture alone
    width: int
    height: int
    model: str
    weights_hash: str  # first 10 hex digits of the SHA-256 of the denoiser's file
    device: str
    precision: str
    software: str
    # Absent in pictures of before there were any.
    options: DrawOptions = PLAIN
    vae: str = ""  # a file's name, and the first 10 hex digits of its SHA-256; "" is none
    loras: str = ""  # "name:0.8 0123456789, other 9876543210"
    init_image: str = ""  # first 10 hex digits of the SHA-256 of the file that it began with
    mask: str = ""
    strength: float = 0.0  # 0: it began with noise
    prediction: str = ""  # as asked for; "": as the model says
    ema: bool = True  # whether averaged weights were taken, where there were both


def software() -> str:
    """This program's name and, where it is installed, its version."""
    try:
        return f"Latent Foundry {importlib.metadata.version('latent-foundry')}"
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "Latent Foundry"


def parameters_text(recipe: Recipe) -> str:
    """A1111's text: the prompt, the negative prompt if there is one, and a last line of `key: value` pairs."""
    pairs = {
        "Steps": recipe.steps,
        "Sampler": SAMPLERS[recipe.sampler].label,
        "CFG scale": repr(recipe.scale).removesuffix(".0"),
        "Seed": recipe.seed,
        "Size": f"{recipe.width}x{recipe.height}",
        "Model hash": recipe.weights_hash,
        "Model": recipe.model,
        **{key: value for key, value in _beside(recipe).items() if value},
        **_option_pairs(recipe.options),
        "Version": recipe.software,
    }
    negative = f"\nNegative prompt: {recipe.negative_prompt}" if recipe.negative_prompt else ""
    return f"{recipe.prompt}{negative}\n{', '.join(f'{key}: {_quote(str(value))}' for key, value in pairs.items())}"


def _beside(recipe: Recipe) -> dict[str, object]:
    return {
        "VAE": recipe.vae,
        "Lora": recipe.loras,
        "Denoising strength": recipe.strength,
        "Init image hash": recipe.init_image,
        "Mask hash": recipe.mask,
    }


def _option_pairs(options: DrawOptions) -> dict[str, object]:
    """The options that are not as they are by default; A1111 knows the first two under these names."""
    known = {"eta": "Eta", "time_grid": "Schedule type"}
    plain, pairs = asdict(PLAIN), asdict(options)
    changed = {key: value for key, value in pairs.items() if value != plain[key]}
    words = {key: " to ".join(map(str, v)) if isinstance(v, tuple) else v for key, v in changed.items()}
    return {known.get(key, key.replace("_", " ").capitalize()): value for key, value in words.items()}


def _quote(value: str) -> str:
    # Beyond the rule of A1111 (, : and newline): its reader strips leading blanks, and unquotes what starts with ".
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n]|^["\s]', value) else value


def png_bytes(image: Image.Image, recipes: Sequence[Recipe]) -> bytes:
    """A PNG file of a picture with its recipe, or of a sheet with those of its pictures in order.

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
    """The recipes in a PNG written by png_bytes. Raises ValueError or OSError if it has none or others."""
    with Image.open(path, formats=["PNG"]) as image:
        image.load()  # texts may also stand behind the pixels
        text = image.info.get(FOUNDRY)
    if text is None:
        raise ValueError(f"{path} has no text {FOUNDRY!r}: another program drew it, or its metadata was removed")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the text {FOUNDRY!r} is not JSON") from error
    return [_recipe(item, path) for item in (content if isinstance(content, list) else [content])]


def _recipe(item: Any, path: Path) -> Recipe:
    kinds = {name: kind for name, kind in get_type_hints(Recipe).items() if name != "options"}
    fields = {key: value for key, value in item.items() if key != "options"} if isinstance(item, dict) else {}
    needed = {entry.name for entry in dataclass_fields(Recipe) if entry.default is MISSING}
    if not needed <= fields.keys() or any(type(value) is not kinds.get(key) for key, value in fields.items()):
        raise ValueError(f"{path}: the text {FOUNDRY!r} is not a recipe with {', '.join(kinds)}")
    try:
        options: dict[str, Any] = dict(item.get("options", {}))
        options["guidance_interval"] = tuple(options.get("guidance_interval", PLAIN.guidance_interval))
        return Recipe(**fields, options=DrawOptions(**options))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: the text {FOUNDRY!r} has options that are none ({error})") from error


class NumberedFiles:
    """New PNG files of one folder, numbered on from the highest that is there: 00000.png, grid-0000.png."""

    def __init__(self, folder: Path, *, prefix: str = "", digits: int) -> None:
        self.folder, self.prefix, self.digits = folder, prefix, digits
        name = re.compile(re.escape(prefix) + r"(\d+)\.png")
        entries = folder.iterdir() if folder.is_dir() else ()
        taken = [int(match[1]) for entry in entries if (match := name.fullmatch(entry.name))]
        self.next = max(taken, default=-1) + 1

    def write(self, content: bytes) -> Path:
        """Write a file that appears only when whole, and never in place of another, whoever wrote that.

        The folder is made with the first file, so that a drawing that fails leaves none.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        return write_new(content, self._paths())

    def _paths(self) -> Iterator[Path]:
        while True:
            path = self.folder / f"{self.prefix}{self.next:0{self.digits}d}.png"
            self.next += 1
            yield path
