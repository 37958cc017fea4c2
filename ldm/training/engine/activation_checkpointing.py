"""Activation checkpointing: recompute a block's activations in the backward pass instead of keeping them in memory.

Chen et al. 2016 (arXiv 1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(network: nn.Module, *, reentrant: bool) -> list[nn.Module]:
    """Apply activation checkpointing to the blocks of a network: the entries of its module lists.

    Only the innermost lists count, so that blocks are not nested. A single layer in a list (attention has one, for the
    name of its output) is not a block. reentrant: use PyTorch's older implementation, which does not compare tensor
    shapes: ZeRO 3 empties weights between the two passes. Returns the blocks. Raises ValueError if there are none.
    """
    entries = [entry for own in network.modules() if isinstance(own, nn.ModuleList) for entry in own]
    candidates = {e: None for e in entries if not isinstance(e, nn.ModuleList) and any(True for _ in e.children())}
    blocks = [block for block in candidates if not any(m in candidates for m in block.modules() if m is not block)]
    if not blocks:
        raise ValueError(f"engine.recompute: {type(network).__name__} has no list of blocks to recompute: leave it out")
    for block in blocks:
        block.forward = partial(_recomputed, block.forward, reentrant)
    return blocks


def _recomputed(forward: Callable[..., Any], reentrant: bool, *inputs: Any, **named: Any) -> Any:
    if not reentrant:
        return checkpoint(forward, *inputs, use_reentrant=False, **named)
    if not any(isinstance(x, Tensor) and x.requires_grad for x in (*inputs, *named.values())):
        return forward(*inputs, **named)  # the reentrant version would give such a block's weights no gradient

    def positional(*values: Any) -> Any:  # the reentrant version tracks gradients only through positional arguments
        return forward(*values[: len(inputs)], **dict(zip(named, values[len(inputs) :], strict=True)))

    return checkpoint(positional, *inputs, *named.values(), use_reentrant=True)
