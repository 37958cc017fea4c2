"""Stable Diffusion's U-Net (Rombach et al. 2022, arXiv:2112.10752), from the 860 M parameters of version 1.5
down to a few million for latents of 16 x 16. Parameter names and shapes are those of diffusers.

Legend: B batch, C channels, H x W latent size, T time width, M x D context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Unpack

from torch import Tensor, nn
from torch.nn import functional as F

from ldm.denoisers.contract import Condition, Denoiser, DenoiserFacts, Output, Sizes
from ldm.denoisers.embeddings import TimestepEmbedding
from ldm.denoisers.unet_blocks import (
    BlockSettings,
    DownBlock,
    MidBlock,
    ResBlock,
    SpatialTransformer,
    TransformerBlock,
    UpBlock,
)


@dataclass(frozen=True, kw_only=True)
class UNetConfig(DenoiserFacts):
    """The U-Net's shape; the defaults are those of Stable Diffusion 1.5.

    One entry per level, from the full resolution down; each level halves the resolution. attention_levels:
    which levels have self-attention and cross-attention (the middle always does). heads: one number for all
    levels, or one per level (version 2: 5, 10, 20, 20). use_linear_projection: as in version 2.
    """

    kind: Literal["unet"] = "unet"
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    heads: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    norm_num_groups: int = 32

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if levels == 0:
            raise ValueError("block_out_channels is empty: give one number of channels per level")
        for name, entries, more in (
            ("attention_levels", self.attention_levels, ""), ("heads", self.heads, ", or one number for all"),
        ):
            if not isinstance(entries, int) and len(entries) != levels:
                raise ValueError(
                    f"{name} has {len(entries)} entries and block_out_channels has {levels}: give one per level{more}"
                )
        if self.layers_per_block < 1 or self.norm_num_groups < 1 or min(self.heads_per_level) < 1:
            raise ValueError(
                f"layers_per_block={self.layers_per_block}, norm_num_groups={self.norm_num_groups} and "
                f"heads={self.heads} must be 1 or more"
            )
        self._check_divisible()

    def _check_divisible(self) -> None:
        if self.block_out_channels[0] % 2:
            raise ValueError(
                f"block_out_channels[0]={self.block_out_channels[0]} must be even: "
                "the time embedding is half cosines, half sines"
            )
        for level, channels in enumerate(self.block_out_channels):
            if channels < 1 or channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels[{level}]={channels} is not a multiple of norm_num_groups="
                    f"{self.norm_num_groups}: change one of them"
                )
            in_the_middle = level == len(self.block_out_channels) - 1
            heads = self.heads_per_level[level]
            if (self.attention_levels[level] or in_the_middle) and channels % heads:
                raise ValueError(
                    f"block_out_channels[{level}]={channels} is not a multiple of its {heads} heads: change one of them"
                )

    @property
    def heads_per_level(self) -> tuple[int, ...]:
        return self.heads if isinstance(self.heads, tuple) else (self.heads,) * len(self.block_out_channels)

    def attention_length(self, side: int) -> int:
        attending = [level for level, attends in enumerate(self.attention_levels) if attends]
        coarsest = len(self.attention_levels) - 1  # where the middle block always has attention
        return (side // 2 ** min([*attending, coarsest])) ** 2

    def describe(self, context_width: int) -> str:
        standard = UNetConfig()
        shape = (self.block_out_channels, self.layers_per_block, self.attention_levels)
        if shape == (standard.block_out_channels, standard.layers_per_block, standard.attention_levels):
            versions = {(768, False): "Stable Diffusion 1", (1024, True): "Stable Diffusion 2"}
            return versions.get((context_width, self.use_linear_projection), "a U-Net of Stable Diffusion's size")
        return f"a U-Net of widths {'-'.join(map(str, self.block_out_channels))}"

    def build(self, **sizes: Unpack[Sizes]) -> UNet:
        return UNet(self, **sizes)


class UNet(Denoiser):
    """Denoiser over latents of any size, conditioned on text by cross-attention.

    concat_channels are 5 in inpainting models and 0 in all others. context_width: of the text encoder's token states.
    """

    def __init__(self, config: UNetConfig, **sizes: Unpack[Sizes]) -> None:
        super().__init__(**sizes)
        channels = config.block_out_channels
        settings = BlockSettings(
            layers=config.layers_per_block,
            time_width=4 * channels[0],
            context_width=sizes["context_width"],
            norm_num_groups=config.norm_num_groups,
            use_linear_projection=config.use_linear_projection,
        )
        pairs = zip(config.heads_per_level, config.attention_levels, strict=True)
        heads = [count if attends else None for count, attends in pairs]
        last = len(channels) - 1
        self.skips_per_block = config.layers_per_block + 1

        self.conv_in = nn.Conv2d(self.in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], settings.time_width)

        self.down_blocks = nn.ModuleList()
        skip_channels = self._add_down_blocks(channels, heads, settings)
        self.mid_block = MidBlock(channels[last], config.heads_per_level[last], settings)
        self.up_blocks = nn.ModuleList()
        self._add_up_blocks(channels, heads, skip_channels, settings)

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], self.out_channels, 3, padding=1)
        self.initialize_weights()

    def _add_down_blocks(
        self, channels: Sequence[int], heads: Sequence[int | None], settings: BlockSettings
    ) -> list[int]:
        """Add the blocks and return the channels of the skip connections, in order."""
        width, last = channels[0], len(channels) - 1
        skip_channels = [width]
        for level, out in enumerate(channels):
            self.down_blocks.append(DownBlock(width, out, heads[level], level < last, settings))
            skip_channels += [out] * (settings.layers + (level < last))
            width = out
        return skip_channels

    def _add_up_blocks(
        self, channels: Sequence[int], heads: Sequence[int | None], skip_channels: list[int], settings: BlockSettings
    ) -> None:
        width = channels[-1]
        for level in range(len(channels) - 1, -1, -1):
            taken = [skip_channels.pop() for _ in range(self.skips_per_block)]
            self.up_blocks.append(UpBlock(width, taken, channels[level], heads[level], level > 0, settings))
            width = channels[level]

    def initialize_weights(self) -> None:
        """Initialise the layers that differ from PyTorch's defaults, which convolutions, norms and the time
        embedding keep."""
        for module in self.modules():
            # Transformer linears: Xavier uniform (Vaswani et al.'s reference code), biases zero, so that
            # queries, keys and values keep the unit variance that the layer norm gives them.
            if isinstance(module, TransformerBlock):
                for name, parameter in module.named_parameters():
                    if parameter.ndim == 2:
                        nn.init.xavier_uniform_(parameter)
                    elif name.endswith("bias"):
                        nn.init.zeros_(parameter)

            # The last layer of each residual branch is zero: every ResBlock and every SpatialTransformer
            # starts as its skip connection (ADM's and Stable Diffusion's reference code).
            if isinstance(module, ResBlock):
                _zero(module.conv2)
            if isinstance(module, SpatialTransformer):
                _zero(module.proj_out)

        # The output convolution is zero: a fresh network predicts exactly zero for any input.
        _zero(self.conv_out)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Output:
        """See Denoiser. H and W may be any size.

        mask and pooled are not used, as in Stable Diffusion: padding is attended to like any token. A model trained
        with a mask would see unknown tokens in other programs' pipelines, which do not pass a mask.
        """
        context = condition.context                                                     # B x M x D
        time = F.silu(self.time_embedding(t, x.dtype))                                  # B x T
        h = self.conv_in(self.with_concat(x, condition))
        skips = [h]
        for block in self.down_blocks:
            h, block_skips = block(h, time, context)
            skips += block_skips
        h = self.mid_block(h, time, context)
        for block in self.up_blocks:
            taken = [skips.pop() for _ in range(self.skips_per_block)]
            # The next skip's size, not twice this one: down-sampling rounds odd sizes up.
            out_size = skips[-1].shape[2:] if skips else x.shape[2:]
            h = block(h, taken, time, context, out_size)
        return self.answer(self.conv_out(F.silu(self.conv_norm_out(h))).to(x.dtype))    # B x C_out x H x W


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
