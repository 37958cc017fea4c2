"""A model that paints each picture in one colour instead of drawing it, for the tests of the command `txt2img.py`."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from PIL import Image

from ldm.diffusion import ScaledLinearBetaPath
from ldm.inference.options import PLAIN
from ldm.inference.recipe import Drawing, recipe_of
from ldm.interop.read_model import LoadOptions
from ldm.model.facts import ModelFacts

if TYPE_CHECKING:
    from ldm.inference.pipeline import TextToImage


def colour(prompt: str, seed: int) -> tuple[int, int, int]:
    value = zlib.crc32(f"{prompt} {seed}".encode())
    return value % 256, value // 256 % 256, value // 65536 % 256


class FakeTextToImage:
    """What ldm.inference.pipeline.TextToImage offers; it keeps what it was called with."""

    name, weights_hash, attention = "tiny", "0123456789", "attention: explicit"
    facts = ModelFacts(
        name=name, path=ScaledLinearBetaPath(), learned_variance=True, native_size=16, factor=8, for_inpainting=False
    )
    description = "a tiny model, sha256 0123456789"
    device: str
    precision: str
    loaded_with: LoadOptions
    loads: list[tuple]
    about: dict
    calls: list[dict]

    @classmethod
    def load(cls, path, *, device="auto", dtype="auto", **about):
        cls.loads.append((str(path), device, dtype))
        cls.about = about
        if "broken" in str(path):
            raise ValueError(f"{path} holds\nno model")
        fake = cls()
        fake.device, fake.precision = f"real {device}", f"real {dtype}"
        fake.loaded_with = LoadOptions(**about)
        return fake

    def draw(self, request, *, n=1, progress=None):
        asked = {"prompt", "negative_prompt", "steps", "scale", "sampler", "seed", "height", "width"}
        image, mask = request.image, request.mask
        self.calls.append(
            {name: getattr(request, name) for name in asked}
            | {"n": n}
            | ({"options": request.options} if request.options != PLAIN else {})
            | ({"image": image.size, "mask": mask and mask.size, "strength": request.strength} if image else {})
        )
        if request.prompt == "interrupt":
            raise KeyboardInterrupt
        assert progress is not None
        for done in range(2 * request.steps):  # in two rounds
            progress(done + 1, 2 * request.steps)
        size = request.width or 16, request.height or 16
        requests = [replace(request, seed=request.seed + i) for i in range(n)]
        images = [Image.new("RGB", size, colour(own.prompt, own.seed)) for own in requests]
        pipe = cast("TextToImage", self)
        return [Drawing(image, recipe_of(own, pipe, image)) for own, image in zip(requests, images, strict=True)]

    def check(self, request):
        return request.check(self.facts)

    def named_in(self, request):
        return {}


def pngs(folder: str = "outputs") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
