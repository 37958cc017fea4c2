"""A model that paints each picture in one colour instead of drawing it, for the tests of the command `txt2img.py`."""

from __future__ import annotations

import zlib
from pathlib import Path

from PIL import Image

from ldm.inference.options import PLAIN


def colour(prompt: str, seed: int) -> tuple[int, int, int]:
    value = zlib.crc32(f"{prompt} {seed}".encode())
    return value % 256, value // 256 % 256, value // 65536 % 256


class FakeTextToImage:
    """What ldm.inference.pipeline.TextToImage offers; it keeps what it was called with."""

    name, weights_hash, native_size, factor, attention = "tiny", "0123456789", 16, 8, "attention: explicit"
    description = "a tiny model, sha256 0123456789"
    device: str
    precision: str
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
        return fake

    def __call__(self, prompt, *, negative_prompt="", steps=30, scale=5.0, sampler="dpmpp_2m", seed=0, n=1,
                 height=None, width=None, image=None, mask=None, strength=None, options=PLAIN,
                 progress=None):  # fmt: skip
        self.calls.append(
            {"prompt": prompt, "negative_prompt": negative_prompt, "steps": steps, "scale": scale, "sampler": sampler,
             "seed": seed, "n": n, "height": height, "width": width}
            | ({"options": options} if options != PLAIN else {})
            | ({"image": image.size, "mask": mask and mask.size, "strength": strength} if image else {})
        )  # fmt: skip
        if prompt == "interrupt":
            raise KeyboardInterrupt
        assert progress is not None
        for done in range(2 * steps):  # in two rounds
            progress(done + 1, 2 * steps)
        return [Image.new("RGB", (width or 16, height or 16), colour(prompt, seed + i)) for i in range(n)]

    def cut_off(self, prompt):
        return prompt[20:]


def pngs(folder: str = "outputs") -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file())
