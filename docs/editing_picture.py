"""Draw docs/editing.png: a picture, the same with other words, and with its upper half repainted.

python docs/editing_picture.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ldm import TextToImage
from ldm.inference.contact_sheet import sheet

DOCS = Path(__file__).parent


def main() -> None:
    pipe = TextToImage.load(DOCS.parent / "weights" / "emoji64", device="cpu", dtype="fp32")
    (begun,) = pipe("a noto emoji of Santa Claus, medium skin tone", seed=7)
    mask = Image.new("L", begun.size, "black")
    mask.paste("white", (0, 0, begun.width, begun.height // 2 - 2))
    changed = pipe("a noto emoji of Santa Claus, dark skin tone", image=begun, strength=0.6, seed=1, n=4)
    painted = pipe("a noto emoji of woman, medium skin tone, red hair", image=begun, mask=mask, seed=1, n=4)
    rows = [begun, *changed, mask.convert("RGB"), *painted]
    sheet(rows, columns=5).save(DOCS / "editing.png", optimize=True)


if __name__ == "__main__":
    main()
