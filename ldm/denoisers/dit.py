"""A diffusion transformer with text cross-attention: PixArt-alpha (Chen et al. 2023, arXiv:2310.00426),
based on DiT (Peebles and Xie 2022, arXiv:2212.09748). Parameter names and shapes are those of diffusers'
PixArtTransformer2DModel (without its extra size conditions).

Legend: B batch, C latent channels, H x W latent size, p patch size, L = H W / p^2 tokens, D width,
M x E context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.denoisers.attention import Attention, FeedForward
from ldm.denoisers.contract import Condition, Denoiser, DenoiserFacts, Output, Sizes
from ldm.denoisers.embeddings import TimestepEmbedding, position_table

NORM_EPS = 1e-6
TIME_FREQUENCIES_WIDTH = 256  # of the sinusoidal embedding, whatever the network's width


@dataclass(frozen=True, kw_only=True)
class DiTConfig(DenoiserFacts):
    """The transformer's shape. sample_size: side of the native latents, for which the position table is made.

    interpolation_scale divides all positions; None: max(sample_size // 64, 1), PixArt's rule, with which a
    model for 128 x 128 latents can start from one for 64 x 64.
    """

    kind: Literal["dit"] = "dit"
    depth: int
    width: int
    heads: int
    sample_size: int
    patch_size: int = 2
    interpolation_scale: float | None = None
    can_learn_variance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if min(self.depth, self.width, self.heads, self.sample_size, self.patch_size) < 1:
            raise ValueError(
                f"depth={self.depth}, width={self.width}, heads={self.heads}, sample_size={self.sample_size} "
                f"and patch_size={self.patch_size} must be 1 or more"
            )
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}, and of 4 for the positions")
        if self.sample_size % self.patch_size:
            raise ValueError(
                f"sample_size={self.sample_size} is not a multiple of patch_size={self.patch_size}: change one of them"
            )
        if self.interpolation_scale is not None and self.interpolation_scale <= 0:
            raise ValueError(f"interpolation_scale={self.interpolation_scale} must be positive, or null")

    @property
    def position_scale(self) -> float:
        if self.interpolation_scale is None:
            return max(self.sample_size // 64, 1)
        return self.interpolation_scale

    @property
    def stride(self) -> int:
        return self.patch_size

    @property
    def native_side(self) -> int:
        return self.sample_size

    def attention_length(self, side: int) -> int:
        return (side // self.patch_size) ** 2

    def describe(self, context_width: int) -> str:
        return f"a DiT of {self.depth} blocks"

    def build(self, **sizes: Unpack[Sizes]) -> DiT:
        return DiT(self, **sizes)


class PatchEmbed(nn.Module):
    """Convert latents to tokens: a p x p convolution of stride p, plus the table of positions."""

    table: Tensor

    def __init__(self, config: DiTConfig, in_channels: int) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.base_size = config.sample_size // config.patch_size
        self.scale = config.position_scale
        self.proj = nn.Conv2d(in_channels, config.width, config.patch_size, stride=config.patch_size)
        # Not persistent: it follows from the config, and diffusers' files do not have it.
        self.register_buffer("table", self._table(self.base_size, self.base_size), persistent=False)

    def _table(self, height: int, width: int) -> Tensor:
        return position_table(height, width, self.base_size, self.scale, self.proj.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """B x C x H x W -> B x L x D."""
        height, width = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        native = height == width == self.base_size
        table = self.table if native else self._table(height, width)                    # L x D
        tokens = self.proj(x).flatten(2).transpose(1, 2)                                # B x L x D
        return tokens + table.to(device=tokens.device, dtype=x.dtype)


class GELU(nn.Module):
    """GELU of a projection of x, in the tanh approximation that PixArt was trained with."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, hidden_width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class CaptionProjection(nn.Module):
    """Project the text encoder's token states to the transformer's width: B x M x E -> B x M x D."""

    def __init__(self, context_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(context_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, context: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(context), approximate="tanh"))


class AdaLNSingle(nn.Module):
    """adaLN-single (PixArt-alpha): one projection of time for all blocks; each adds its own table."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedding(TIME_FREQUENCIES_WIDTH, width)})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """t B -> the blocks' modulation B x 6 x D and the embedded time B x D."""
        embedded = self.emb["timestep_embedder"](t, dtype)                              # B x D
        return self.linear(F.silu(embedded)).unflatten(1, (6, -1)), embedded


class DiTBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward. Time modulates and gates the first and the last; in
    PixArt, cross-attention has neither norm nor gate."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))
        self.attn1 = Attention(width, width, heads, qkv_bias=True)
        self.attn2 = Attention(width, width, heads, qkv_bias=True)
        self.ff = FeedForward(GELU(width, 4 * width), width)

    def forward(self, x: Tensor, modulation: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """x B x L x D; modulation B x 6 x D; context B x M x D; mask bool B x 1 x 1 x M. -> B x L x D."""
        # Under autocast x, the residual stream, is float32, and its branches are computed in the dtype of the
        # matrix products, which is the projected context's: one cast per branch, not one for each of q, k and v.
        table = (self.scale_shift_table + modulation).to(context.dtype)                 # B x 6 x D
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = table.chunk(6, dim=1)
        h = modulate(x, shift_attn, scale_attn)                                         # B x L x D
        x = x + gate_attn * self.attn1(h, h)
        x = x + self.attn2(x, context, mask)
        return x + gate_ff * self.ff(modulate(x, shift_ff, scale_ff))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift: DiT, section 3.2, adaLN. x B x L x D; shift, scale B x 1 x D."""
    h = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS).to(shift.dtype)
    return torch.addcmul(shift, h, 1 + scale)


class DiT(Denoiser):
    """A transformer denoiser for latents of any size divisible into patches. context_width: of the text encoder."""

    def __init__(self, config: DiTConfig, **sizes: Unpack[Sizes]) -> None:
        super().__init__(**sizes)
        self.patch_size = config.patch_size
        self.pos_embed = PatchEmbed(config, self.in_channels)
        self.adaln_single = AdaLNSingle(config.width)
        self.caption_projection = CaptionProjection(sizes["context_width"], config.width)
        blocks = [DiTBlock(config.width, config.heads) for _ in range(config.depth)]
        self.transformer_blocks = nn.ModuleList(blocks)
        self.scale_shift_table = nn.Parameter(torch.empty(2, config.width))
        self.proj_out = nn.Linear(config.width, config.patch_size**2 * self.out_channels)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        # Xavier uniform for linear layers, zero biases; the patch convolution is treated as a linear layer over
        # a patch (DiT's reference code).
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        # The time MLP: N(0, 0.02^2) (DiT's reference code). PixArt, at a width of 1152, also uses it for the
        # caption projection and the modulation below; at small widths that nearly mutes the text, and in a
        # trial (width 128, 600 steps) training was slower: loss 0.124 instead of 0.085 as initialised here.
        for module in self.adaln_single.emb.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

        # Modulation: the shared projection of time is zero (DiT's adaLN-Zero), the tables are N(0, 1 / width)
        # (PixArt's reference code). So gates start small, not at zero as in DiT, and attention and feed-forward
        # learn as soon as proj_out is no longer zero.
        nn.init.zeros_(self.adaln_single.linear.weight)
        nn.init.normal_(self.scale_shift_table, std=self.scale_shift_table.shape[1] ** -0.5)
        for module in self.modules():
            if isinstance(module, DiTBlock):
                nn.init.normal_(module.scale_shift_table, std=module.scale_shift_table.shape[1] ** -0.5)

                # Cross-attention has no gate, so its output projection is zero: the influence of the text grows
                # from zero (PixArt's reference code).
                for parameter in module.attn2.to_out.parameters():
                    nn.init.zeros_(parameter)

        # The output layer is zero: a fresh network predicts exactly zero for any input.
        nn.init.zeros_(self.proj_out.weight)

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Output:
        """See Denoiser. H and W must be multiples of the patch size (else ValueError).

        Masked tokens have no influence. Each row needs at least one token (a tokenizer always gives two, the text's
        start and end). pooled is not used: PixArt conditions only on the token states.
        """
        height, width = x.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"latents of {height} x {width} do not divide into patches of {self.patch_size}")
        mask = condition.mask[:, None, None, :]                                         # B x 1 x 1 x M
        h = self.pos_embed(self.with_concat(x, condition))                              # B x L x D
        modulation, embedded_time = self.adaln_single(t, x.dtype)                       # B x 6 x D, B x D
        context = self.caption_projection(condition.context)                            # B x M x D
        for block in self.transformer_blocks:
            h = block(h, modulation, context, mask)
        shift, scale = (self.scale_shift_table + embedded_time[:, None]).chunk(2, dim=1)
        patches = self.proj_out(modulate(h, shift, scale))                              # B x L x p^2 C
        return self.answer(self._unpatchify(patches, height, width).to(x.dtype))

    def _unpatchify(self, patches: Tensor, height: int, width: int) -> Tensor:
        """B x L x p^2 C, channels innermost -> B x C x H x W."""
        p = self.patch_size
        grid = torch.unflatten(torch.unflatten(patches, 2, (p, p, -1)), 1, (height // p, width // p))
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
