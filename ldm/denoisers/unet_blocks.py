"""Building blocks of Stable Diffusion's U-Net (Rombach et al. 2022, arXiv:2112.10752), based on ADM's
(Dhariwal and Nichol 2021, arXiv:2105.05233). Module names, the state dict's keys, are those of diffusers.

Legend: B batch, C channels, H x W latent size at this level, L = H W tokens, T time width, M x D context.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.denoisers.attention import Attention, FeedForward


@dataclass(frozen=True, kw_only=True)
class BlockSettings:
    """Settings common to all levels of a U-Net."""

    layers: int
    time_width: int
    context_width: int
    norm_num_groups: int
    use_linear_projection: bool


class ResBlock(nn.Module):
    """Two convolutions, the time embedding added between them, and a skip connection around them."""

    def __init__(self, in_channels: int, out_channels: int, settings: BlockSettings) -> None:
        super().__init__()
        groups = settings.norm_num_groups
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(settings.time_width, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x B x C_in x H x W; time B x T, already through SiLU. -> B x C_out x H x W."""
        h = self.conv1(F.silu(self.norm1(x)))                                           # B x C_out x H x W
        h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class GEGLU(nn.Module):
    """a * GELU(b), both projected from x: Shazeer 2020 (arXiv:2002.05202), eq. 6."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden_width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward, each with a layer norm and a residual connection."""

    def __init__(self, width: int, heads: int, context_width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = Attention(width, width, heads, qkv_bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.attn2 = Attention(width, context_width, heads, qkv_bias=False)
        self.norm3 = nn.LayerNorm(width)
        self.ff = FeedForward(GEGLU(width, 4 * width), width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x B x L x C; context B x M x D. -> B x L x C."""
        # CUDA's autocast returns layer norms in float32. One cast here saves one each for q, k and v.
        h = self.norm1(x).to(x.dtype)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x).to(x.dtype), context)
        return x + self.ff(self.norm3(x).to(x.dtype))


class SpatialTransformer(nn.Module):
    """A transformer block over the pixels of a feature map, with a residual connection."""

    def __init__(self, channels: int, heads: int, settings: BlockSettings) -> None:
        super().__init__()
        self.use_linear_projection = settings.use_linear_projection
        self.norm = nn.GroupNorm(settings.norm_num_groups, channels, eps=1e-6)
        self.proj_in = self._projection(channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, settings.context_width)])
        self.proj_out = self._projection(channels)

    def _projection(self, channels: int) -> nn.Module:
        # The same function with weights of another shape: convolutions in Stable Diffusion 1, linear layers in 2.
        if self.use_linear_projection:
            return nn.Linear(channels, channels)
        return nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x B x C x H x W; context B x M x D. -> B x C x H x W."""
        size = x.shape[2:]
        h = self.norm(x)                                                                # B x C x H x W
        if self.use_linear_projection:
            h = self.proj_in(h.flatten(2).transpose(1, 2))                              # B x L x C
        else:
            h = self.proj_in(h).flatten(2).transpose(1, 2)                              # B x L x C
        h = self.transformer_blocks[0](h, context)                                      # B x L x C
        if self.use_linear_projection:
            h = self.proj_out(h).transpose(1, 2).unflatten(2, size)                     # B x C x H x W
        else:
            h = self.proj_out(h.transpose(1, 2).unflatten(2, size))                     # B x C x H x W
        return x + h


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W -> B x C x ceil(H / 2) x ceil(W / 2)."""
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Upsample to `size`, about twice that of x, by nearest neighbours, then convolve."""
        return self.conv(F.interpolate(x, size=list(size), mode="nearest"))


def _attention_layers(channels: int, heads: int | None, count: int, settings: BlockSettings) -> nn.ModuleList:
    if heads is None:
        return nn.ModuleList()
    return nn.ModuleList([SpatialTransformer(channels, heads, settings) for _ in range(count)])


class DownBlock(nn.Module):
    """One level of the encoder. heads: None for a level without attention."""

    def __init__(
        self, in_channels: int, out_channels: int, heads: int | None, downsample: bool, settings: BlockSettings
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * settings.layers
        pairs = itertools.pairwise(widths)
        self.resnets = nn.ModuleList([ResBlock(before, after, settings) for before, after in pairs])
        self.attentions = _attention_layers(out_channels, heads, settings.layers, settings)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)] if downsample else [])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the output, and the skip connections: the output of every layer, including the last."""
        skips: list[Tensor] = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class MidBlock(nn.Module):
    """ResBlock, attention, ResBlock at the lowest resolution."""

    def __init__(self, channels: int, heads: int, settings: BlockSettings) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(channels, channels, settings) for _ in range(2)])
        self.attentions = _attention_layers(channels, heads, 1, settings)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[0](x, time)
        x = self.attentions[0](x, context)
        return self.resnets[1](x, time)


class UpBlock(nn.Module):
    """One level of the decoder. skip_channels: of the skip connections, in the order of use.

    heads: None for a level without attention.
    """

    def __init__(
        self,
        in_channels: int,
        skip_channels: Sequence[int],
        out_channels: int,
        heads: int | None,
        upsample: bool,
        settings: BlockSettings,
    ) -> None:
        super().__init__()
        before = [in_channels] + [out_channels] * (len(skip_channels) - 1)
        widths = [width + skip for width, skip in zip(before, skip_channels, strict=True)]
        self.resnets = nn.ModuleList([ResBlock(width, out_channels, settings) for width in widths])
        self.attentions = _attention_layers(out_channels, heads, len(skip_channels), settings)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if upsample else [])

    def forward(
        self, x: Tensor, skips: Sequence[Tensor], time: Tensor, context: Tensor, out_size: Sequence[int]
    ) -> Tensor:
        """skips: one per ResBlock, in the order of use; out_size: (H, W) to upsample to, if it does."""
        for i, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            x = resnet(torch.cat([x, skip], dim=1), time)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsampler in self.upsamplers:
            x = upsampler(x, out_size)
        return x
