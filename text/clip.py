"""Build a small CLIP to train from scratch: open_clip's own model, with sizes from our configuration."""

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
    """Configuration of the image tower: a timm network without pretrained weights, and the joint space's width.

    On a few thousand images, a vision transformer of the same cost learns more slowly than a convolutional network,
    which does not have to learn first that neighbouring pixels are related.
    """

    timm_model: str = "convnext_atto"
    image_size: int = 64  # pixels per side
    embed_dim: int = 128

    @property
    def vision_cfg(self) -> dict[str, Any]:
        """The `vision_cfg` with which open_clip builds this tower."""
        return {
            "timm_model_name": self.timm_model,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": self.image_size,
        }


def build_clip(text: TextEncoderConfig, image: ImageTowerConfig) -> CLIP:
    """Build open_clip's CLIP with random weights; called as (pixels, tokens), it returns unit features and logit scale.

    Raises ValueError if timm has no such network.
    """
    import timm
    from open_clip import CLIP
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    if image.timm_model not in timm.list_models():
        raise ValueError(f"image.timm_model is {image.timm_model!r}, which timm does not have: see timm.list_models()")
    vision_cfg = CLIPVisionCfg(**image.vision_cfg)
    text_cfg = CLIPTextCfg(**open_clip_text_cfg(text))
    # The logit scale is a vector of one number: DeepSpeed cannot broadcast a 0-D parameter.
    quick_gelu = text.activation == "quick_gelu"
    return CLIP(image.embed_dim, vision_cfg, text_cfg, quick_gelu=quick_gelu, nonscalar_logit_scale=True)


def open_clip_config_json(text: TextEncoderConfig, image: ImageTowerConfig) -> dict[str, Any]:
    """Build open_clip_config.json, with which `open_clip.create_model("local-dir:FOLDER")` loads the trained model."""
    model_cfg = {
        "embed_dim": image.embed_dim,
        "quick_gelu": text.activation == "quick_gelu",
        "vision_cfg": image.vision_cfg,
        "text_cfg": open_clip_text_cfg(text),
    }
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": image.image_size}
    return {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg, "foundry": asdict(text)}


def shifted(pixels: Tensor, offsets: Tensor, largest: int) -> Tensor:
    """Shift each image by its own offset, repeating its edge pixels: an augmentation for small sets.

    offsets B x 2 in [0, 1): 0 shifts by `largest` pixels down or right, nearly 1 by as many up or left.
    """
    padded = F.pad(pixels, (largest,) * 4, mode="replicate")
    starts = (offsets * (2 * largest + 1)).long().tolist()
    height, width = pixels.shape[2:]
    return torch.stack([p[:, y : y + height, x : x + width] for p, (y, x) in zip(padded, starts, strict=True)])


@torch.no_grad()
def recall(image_features: Tensor, text_features: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Compute recall at k: the fraction of captions whose own image is among the k nearest, and vice versa.

    Unit features N x D; row i of one matches row i of the other. -> {"text_to_image_1": ..., ...}.
    """
    similarity = text_features @ image_features.T
    own = similarity.diagonal()
    ranks = {
        # Count the values that are not lower, so that NaN features score zero.
        "text_to_image": (~(similarity < own[:, None])).sum(dim=1) - 1,
        "image_to_text": (~(similarity < own[None, :])).sum(dim=0) - 1,
    }
    return {f"{name}_{k}": (rank < k).float().mean().item() for name, rank in ranks.items() for k in ks}


def features(model: nn.Module, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Compute unit features of images and captions, B x D each, in eval mode and without gradients."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        image, text, _ = model(pixels, tokens)
    model.train(was_training)
    return image, text
