"""The layers of a transformer block: multi-head attention, with the choice of its kernel, and feed-forward.

Legend: B batch, H heads, L query tokens, M key tokens, D width, C context width, d = D / H head width.
"""

import functools
import importlib
import math
from collections.abc import Callable

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

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, xformers: Kernel | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, eq. 1 of Vaswani et al. 2017 (arXiv:1706.03762).

    q B x H x L x d; k, v B x H x M x d; mask bool B x 1 x 1 x M, True where a key may be attended.
    xformers: its kernel, for use where it is able to.
    Returns B x H x L x d. Every row of the mask needs at least one True: the softmax over nothing is NaN.
    """
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if _explicit_is_faster(q.device.type, q.dtype, q.shape[2] * k.shape[2], needs_grad):
        return _explicit_attention(q, k, v, mask)
    # xformers needs a mask as an expanded bias, padded to its alignment; SDPA takes a mask as it is.
    if xformers is not None and mask is None and q.shape[3] % 8 == 0:
        # It orders B x L x H x d, which undoes the transposition that made q, k and v: no copy.
        return xformers(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def choose_attention(network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Let the network's attention use xformers if its kernels run on this device in this dtype (autocast's).

    Call it once, before the network is compiled: forward only uses what was found here.
    """
    kernel = _xformers(device.type, dtype)[0] if device.type == "cuda" else None
    for module in network.modules():
        if isinstance(module, Attention):
            module.xformers = kernel


def describe_attention(
    device: torch.device | str, length: int, dtype: torch.dtype = torch.bfloat16, *, training: bool = True
) -> str:
    """Return a line for the log: the kernel that `device` uses for self-attention, and why.

    length: tokens of a sequence; dtype: of the matrix products (the autocast dtype).
    """
    device_type, name = torch.device(device).type, str(dtype).removeprefix("torch.")
    if _explicit_is_faster(device_type, dtype, length * length, needs_grad=training):
        return (
            f"attention: explicit matrix products (the CPU's fused backward in {name} is slower "
            f"up to {math.isqrt(EXPLICIT_MAX_SCORES)} tokens; here {length})"
        )
    if device_type != "cuda":
        return f"attention: PyTorch SDPA (on {device_type} for {length} tokens in {name})"
    kernel, failure = _xformers(device_type, dtype)
    if kernel is None:
        return f"attention: PyTorch SDPA (xformers not used: {failure})"
    return "attention: xformers (its kernels run on this GPU; SDPA for attention with a mask)"


def _explicit_is_faster(device_type: str, dtype: torch.dtype, scores: int, needs_grad: bool) -> bool:
    """scores: L x M, the size of one head's attention matrix."""
    return device_type == "cpu" and needs_grad and dtype == torch.bfloat16 and scores <= EXPLICIT_MAX_SCORES


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


@functools.cache
def _xformers(device_type: str, dtype: torch.dtype) -> tuple[Kernel | None, str]:
    """Return xformers' kernel if it can train a tiny attention, else None and the reason why not.

    An installed package does not suffice: its kernels are built for one PyTorch version and load with no other.
    The import takes ten seconds, so it happens here, once, and only for a GPU.
    """
    try:
        kernel: Kernel = importlib.import_module("xformers.ops").memory_efficient_attention
        q = torch.ones(1, 8, 1, 32, device=device_type, dtype=dtype, requires_grad=True)
        with torch.enable_grad():
            torch.autograd.grad(kernel(q, q, q).sum(), q)
    except ModuleNotFoundError as error:
        return None, f"no module {error.name}"
    except Exception as error:  # whatever an optional package raises, use SDPA and log the reason
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return kernel, ""


class Attention(nn.Module):
    """Multi-head attention from x to itself or to a context, with diffusers' parameter names.

    qkv_bias: Stable Diffusion's projections have no bias, PixArt's have one; the output's always has.
    """

    def __init__(self, width: int, context_width: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.xformers: Kernel | None = None  # see choose_attention
        self.to_q = nn.Linear(width, width, bias=qkv_bias)
        self.to_k = nn.Linear(context_width, width, bias=qkv_bias)
        self.to_v = nn.Linear(context_width, width, bias=qkv_bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x B x L x D; context B x M x C (x itself: self-attention); mask as in `attention`. -> B x L x D."""
        q = self._split_heads(self.to_q(x))                                             # B x H x L x d
        k = self._split_heads(self.to_k(context))                                       # B x H x M x d
        v = self._split_heads(self.to_v(context))                                       # B x H x M x d
        out = attention(q, k, v, mask, xformers=self.xformers)                          # B x H x L x d
        return self.to_out[0](out.transpose(1, 2).flatten(2))                           # B x L x D

    def _split_heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """A linear layer with its activation, D -> 4 D, and one back to D, with diffusers' parameter names."""

    def __init__(self, activation: nn.Module, width: int) -> None:
        super().__init__()
        # The identity takes the place of diffusers' dropout, so that the last layer's name is net.2.
        self.net = nn.Sequential(activation, nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
