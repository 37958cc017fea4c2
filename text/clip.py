"""A small CLIP to train from scratch: open_clip's own model, of a size that our configuration gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from text.encoder import TextEncoderConfig, open_clip_text_cfg

if TYPE_CHECKING:
    from open_clip import CLIP

MAX_LOGIT_SCALE = 100.0  # Radford et al. 2021 (arXiv 2103.00020), section 2.5


@dataclass(frozen=True, kw_only=True)
class ImageTowerConfig:
    """The image tower: any network of timm's, without pretrained weights, and the joint space's width.

    A vision transformer of the same cost learns more slowly from a few thousand pictures than a convolutional
    network, which need not find out first that neighbouring pixels belong together.
    """

    timm_model: str = "convnext_atto"
    image_size: int = 64  # pixels a side
    embed_dim: int = 128

    @property
    def vision_cfg(self) -> dict[str, Any]:
        """open_clip's own description of this tower."""
        return {
            "timm_model_name": self.timm_model,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": self.image_size,
        }


def build_clip(text: TextEncoderConfig, image: ImageTowerConfig) -> CLIP:
    """open_clip's CLIP with fresh weights; called as (pixels, tokens) it gives unit features and the logit scale.

    Raises ValueError if timm has no such network.
    """
    import timm
    from open_clip import CLIP
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    if image.timm_model not in timm.list_models():
        raise ValueError(f"image.timm_model is {image.timm_model!r}, which timm does not have: see timm.list_models()")
    vision_cfg = CLIPVisionCfg(**image.vision_cfg)
    text_cfg = CLIPTextCfg(**open_clip_text_cfg(text))
    # The logit scale as one number in a row: DeepSpeed cannot broadcast a parameter without dimensions.
    quick_gelu = text.activation == "quick_gelu"
    return CLIP(image.embed_dim, vision_cfg, text_cfg, quick_gelu=quick_gelu, nonscalar_logit_scale=True)


def open_clip_config_json(text: TextEncoderConfig, image: ImageTowerConfig) -> dict[str, Any]:
    """open_clip_config.json, with which `open_clip.create_model("local-dir:FOLDER")` opens what was trained."""
    model_cfg = {
        "embed_dim": image.embed_dim,
        "quick_gelu": text.activation == "quick_gelu",
        "vision_cfg": image.vision_cfg,
        "text_cfg": open_clip_text_cfg(text),
    }
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": image.image_size}
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg, "foundry": asdict(text)}


def shifted(pixels: Tensor, offsets: Tensor, largest: int) -> Tensor:
    """Each picture moved by its own offset over its edge colour, which makes a small set go further.

    offsets B x 2 in [0, 1): 0 moves `largest` pixels down or right, nearly 1 as many up or left.
    """
    padded = F.pad(pixels, (largest,) * 4, mode="replicate")
    starts = (offsets * (2 * largest + 1)).long().tolist()
    height, width = pixels.shape[2:]
    return torch.stack([p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, starts, strict=True)])


@torch.no_grad()
def recall(image_features: Tensor, text_features: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Share of captions whose own picture is among the k nearest, and of pictures whose own caption is.

    Unit features N x D, row i of one belonging to row i of the other. -> {"text_to_image_1": ..., ...}.
    """
    similarity = text_features @ image_features.T
    own = similarity.diagonal()
    ranks = {
        # Counted by what is not below, so that features which are no numbers find nothing.
        "text_to_image": (~(similarity < own[:, None])).sum(dim=1) - 1,
        "image_to_text": (~(similarity < own[None, :])).sum(dim=0) - 1,
    }
    return {f"{name}_{k}": (rank < k).float().mean().item() for name, rank in ranks.items() for k in ks}


def features(model: nn.Module, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Unit features of pictures and captions, B x D each, in eval mode and without gradients."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        image, text, _ = model(pixels, tokens)
    model.train(was_training)
    return image, text
