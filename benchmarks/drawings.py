"""Draw the captions of a split, next to the true pictures, and count how often the right one is recognised.

    python benchmarks/drawings.py --split val --out docs/drawings_val.png
    python benchmarks/drawings.py --ckpt runs/emoji64_dit/model --split val --count 379 --clip runs/emoji64_clip/clip

The captions are the first ones of the split's shards, which a hash has shuffled: nothing is picked. Each drawing is
compared with all the true pictures of its style among those that were counted, by the cosine of their features; "top_5"
is the fraction of drawings whose own true picture is among the five nearest. The features are EfficientNet-Lite0's, of
ImageNet, and with --clip also those of a CLIP that text/train.py trained. Use both figures only to compare
models: the autoencoder's loss contains the first, and the second was trained on the training pictures.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import CaptionedImages, DataConfig
from ldm import DrawRequest, TextToImage
from ldm.inference.contact_sheet import save_image, sheet, to_images
from vae.losses import EfficientNetDistance

COLUMNS = 10
TOPS = (1, 5, 10)


def read_split(split: str, count: int) -> tuple[Tensor, list[str]]:
    """Read pixels and best captions of the first `count` pictures."""
    config = DataConfig(shards=(f"data/emoji64/{split}/*.tar.gz",), lanes=1, captions="best")
    pixels, captions = [], []
    for batch in CaptionedImages(config, seed=0).once(64):
        pixels.append(batch.pixels)
        captions += batch.captions
        if len(captions) >= count:
            break
    return torch.cat(pixels)[:count], captions[:count]


@torch.no_grad()
def imagenet_features(pixels: Tensor) -> Tensor:
    """Compute EfficientNet-Lite0's map at 1/16 of the side, a unit vector per picture, N x D: positions count too."""
    network = EfficientNetDistance()
    maps = torch.cat([network.features(part.clamp(-1, 1))[-1] for part in pixels.split(128)])
    return F.normalize(maps.flatten(1), dim=1)


@torch.no_grad()
def clip_features(clip: Path, pixels: Tensor) -> Tensor:
    """Compute unit features of an open_clip folder's image tower, N x D."""
    import open_clip

    model: Any = open_clip.create_model(f"local-dir:{clip}").eval()
    return torch.cat([model.encode_image(part.clamp(-1, 1), normalize=True) for part in pixels.split(128)])


def recognised(drawn: Tensor, true: Tensor, captions: list[str]) -> dict[str, float]:
    """Compute the fraction of drawings whose true picture is among the nearest of its style; features N x D."""
    noto = torch.tensor(["noto" in caption for caption in captions])
    similarity = drawn @ true.T
    similarity[noto[:, None] != noto[None, :]] = -2.0
    rank = (similarity > similarity.diagonal()[:, None]).sum(dim=1)
    return {f"top_{k}": round((rank < k).float().mean().item(), 3) for k in TOPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", type=Path, default=Path("weights/emoji64"))
    parser.add_argument("--split", choices=("train", "val", "unseen"), default="val")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--scale", type=float, default=5.0)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--clip", type=Path, help="RUN/clip of text/train.py: count by its features too")
    parser.add_argument("--out", type=Path, help="sheet of the first 40: each drawing above the true picture")
    args = parser.parse_args()
    true, captions = read_split(args.split, args.count)
    pipe = TextToImage.load(args.ckpt, dtype=args.dtype)
    started = time.monotonic()
    settings = {"negative_prompt": "", "steps": args.steps, "scale": args.scale, "sampler": args.sampler}
    requests = [DrawRequest(prompt=caption, seed=args.seed + i, **settings) for i, caption in enumerate(captions)]
    drawn = pipe.pixels(*requests).cpu()
    found: dict[str, object] = {"split": args.split, "pictures": len(captions)} | settings
    found["seconds"] = round(time.monotonic() - started, 1)
    found["imagenet"] = recognised(imagenet_features(drawn), imagenet_features(true), captions)
    if args.clip:
        found["clip"] = recognised(clip_features(args.clip, drawn), clip_features(args.clip, true), captions)
    print(json.dumps(found))
    if args.out:
        images, labels = [], []
        for start in range(0, min(len(captions), 40), COLUMNS):
            images += to_images(drawn[start : start + COLUMNS]) + to_images(true[start : start + COLUMNS])
            labels += captions[start : start + COLUMNS] * 2
        save_image(sheet(images, columns=COLUMNS, labels=labels, zoom=2), args.out)


if __name__ == "__main__":
    main()
