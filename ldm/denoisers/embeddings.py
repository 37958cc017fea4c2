"""Embeddings of time and of position, shared by the denoisers.

Legend: B batch, D width, N frequencies, h x w grid of patches.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoidal_time_embedding(t: Tensor, width: int) -> Tensor:
    """[cos(t w_i), sin(t w_i)] with w_i = 10000^(-i / N), N = width / 2: DDPM (arXiv:2006.11239), appendix B.

    Cosines come first, and the exponent's divisor is N, not N - 1: in diffusers' terms `flip_sin_to_cos` and
    `freq_shift` 0, as Stable Diffusion and PixArt were trained.
    t B float in 0..1000; width even. Returns B x width in float32, because a half-precision t cannot distinguish
    neighbouring timesteps.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half         # N
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * exponents)               # B x N
    return torch.cat([angles.cos(), angles.sin()], dim=1)                               # B x 2N


class TimestepEmbedding(nn.Module):
    """A two-layer MLP on the sinusoidal embedding: B x in_width -> B x width."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.in_width = in_width
        self.linear_1 = nn.Linear(in_width, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """t B float in 0..1000; dtype: that of the network's activations."""
        embedding = sinusoidal_time_embedding(t, self.in_width).to(dtype)               # B x in_width
        return self.linear_2(F.silu(self.linear_1(embedding)))                          # B x D


def position_table(height: int, width: int, base_size: int, scale: float, dim: int) -> Tensor:
    """Compute the 2-D sin-cos position embedding: half of the channels encode the column, half the row.

    The 1-D embedding of Vaswani et al. 2017 (arXiv:1706.03762), section 3.5, on each axis. Positions are
    stretched so that any grid spans the range of the native one, [0, base_size), divided by `scale`, as in
    PixArt (arXiv:2310.00426): a larger image has positions between those of training, never beyond them.
    height, width, base_size: patches; dim divisible by 4. Returns (height * width) x dim, float32, on the CPU
    whatever the default device, so that a network built on the meta device has its table as well.
    """
    cpu = torch.device("cpu")
    rows = torch.arange(height, dtype=torch.float32, device=cpu) / (height / base_size) / scale
    columns = torch.arange(width, dtype=torch.float32, device=cpu) / (width / base_size) / scale
    row_table = _sincos(rows, dim // 2)[:, None].expand(-1, width, -1)                  # h x w x dim / 2
    column_table = _sincos(columns, dim // 2)[None].expand(height, -1, -1)              # h x w x dim / 2
    return torch.cat([column_table, row_table], dim=-1).flatten(0, 1)


def _sincos(positions: Tensor, dim: int) -> Tensor:
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=positions.device) / half)
    angles = positions.double()[:, None] * frequencies                                  # positions x half
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()
