"""Multi-head attention, and the choice of the kernel that computes it.

Legend: B batch, H heads, L query tokens, M key tokens, D width, C context width, d = D / H head width.
"""

import functools
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Measured on a 2-core AVX-512 CPU with bfloat16 matrix instructions, one thread, forward and backward in
# bfloat16: the fused kernel's time divided by that of explicit products.
#     L x M            64x64  128x128  256x256  512x512  1024x1024   64x32  256x32  1024x64  4096x77
#     4 heads, d 64      5.4      3.6      1.2      0.8        0.8     6.8     4.9      1.0      1.1
#     8 heads, d 32      9.3      6.3      3.3      1.6        0.8    12.5     6.9      1.4      1.4
# It is the fused backward in bfloat16 that is slow. In float32 (0.9 to 1.3 at 64x64, 0.4 to 0.8 at 512x512)
# and without a backward (0.9 to 1.0, and 0.7) the fused kernel is about as fast or faster at every length.
EXPLICIT_MAX_SCORES = 256 * 256

Kernel = Literal["explicit", "sdpa", "xformers"]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, eq. 1 of Vaswani et al. 2017 (arXiv:1706.03762).

    q B x H x L x d; k, v B x H x M x d; mask bool B x 1 x 1 x M, True where a key may be attended.
    Returns B x H x L x d. Every row of the mask needs at least one True: the softmax over nothing is NaN.
    """
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    kernel = _choose_kernel(q.device.type, q.dtype, q.shape[2] * k.shape[2], needs_grad)
    if kernel == "explicit":
        return _explicit_attention(q, k, v, mask)
    # xformers needs a mask as an expanded bias, padded to its alignment; SDPA takes a mask as it is.
    if kernel == "xformers" and mask is None and q.shape[3] % 8 == 0:
        return _xformers_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def describe_attention(
    device: torch.device | str, length: int, dtype: torch.dtype = torch.bfloat16, *, training: bool = True
) -> str:
    """Return a line for the log: the kernel that `device` uses for self-attention, and why.

    length: tokens of a sequence; dtype: of the matrix products (the autocast dtype).
    """
    device_type = torch.device(device).type
    match _choose_kernel(device_type, dtype, length * length, needs_grad=training):
        case "explicit":
            return (
                f"attention: explicit matrix products (the CPU's fused backward in {_name(dtype)} is slower "
                f"up to {math.isqrt(EXPLICIT_MAX_SCORES)} tokens; here {length})"
            )
        case "xformers":
            return "attention: xformers (its kernels run on this GPU; SDPA for attention with a mask)"
        case "sdpa" if device_type == "cuda":
            return f"attention: PyTorch SDPA (xformers not used: {_xformers_failure(device_type, dtype)})"
        case "sdpa":
            return f"attention: PyTorch SDPA (on {device_type} for {length} tokens in {_name(dtype)})"


def _choose_kernel(device_type: str, dtype: torch.dtype, scores: int, needs_grad: bool) -> Kernel:
    """scores: L x M, the size of one head's attention matrix."""
    if device_type == "cpu":
        explicit = needs_grad and dtype == torch.bfloat16 and scores <= EXPLICIT_MAX_SCORES
        return "explicit" if explicit else "sdpa"
    if device_type == "cuda" and _xformers_failure(device_type, dtype) is None:
        return "xformers"
    return "sdpa"


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    batch, heads, length, width = q.shape
    bias = q.new_zeros(1, 1, 1)
    if mask is not None:
        bias = q.new_zeros(mask.shape).masked_fill(~mask, -math.inf)                    # B x 1 x 1 x M
        bias = bias.expand(batch, heads, 1, -1).flatten(0, 1)                           # BH x 1 x M
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)                         # BH x L (or M) x d
    # One call scales, multiplies and adds the bias, without a pass over the scores for each.
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=width**-0.5)               # BH x L x M
    return torch.bmm(scores.softmax(dim=-1), v).view(batch, heads, length, width)


def _xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    # xformers orders B x L x H x d, which undoes the transposition that made q, k and v: no copy.
    return memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@functools.cache
def _xformers_failure(device_type: str, dtype: torch.dtype) -> str | None:
    """Return None if xformers can train a tiny attention, else the reason why not.

    An installed package does not suffice: its kernels are built for one PyTorch version and load with no other.
    The import takes ten seconds, so it happens here, once, and only for a GPU.
    """
    try:
        q = torch.ones(1, 1, 8, 32, device=device_type, dtype=dtype, requires_grad=True)
        with torch.enable_grad():
            _xformers_attention(q, q, q).sum().backward()
    except ModuleNotFoundError as error:
        return f"no module {error.name}"
    except Exception as error:  # whatever an optional package raises, use SDPA and log the reason
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Attention(nn.Module):
    """Multi-head attention from x to itself or to a context, with diffusers' parameter names.

    qkv_bias: Stable Diffusion's projections have no bias, PixArt's have one; the output's always has.
    """

    def __init__(self, width: int, context_width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=qkv_bias)
        self.to_k = nn.Linear(context_width, width, bias=qkv_bias)
        self.to_v = nn.Linear(context_width, width, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x B x L x D; context B x M x C (x itself: self-attention); mask as in `attention`. -> B x L x D."""
        q = self._split_heads(self.to_q(x))                                             # B x H x L x d
        k = self._split_heads(self.to_k(context))                                       # B x H x M x d
        v = self._split_heads(self.to_v(context))                                       # B x H x M x d
        out = attention(q, k, v, mask)                                                  # B x H x L x d
        return self.to_out[0](out.transpose(1, 2).flatten(2))                           # B x L x D

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
