"""Muon: orthogonalised momentum for the weights of linear layers, full or sharded by ZeRO.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon), scaled as in Liu et al. 2025 (arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

# a, b, c of p(s) = a s + b s^3 + c s^5. Five iterations map singular values to about 1: steep at 0, not exact.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
TINIEST = 1e-7  # lower bound on the norm, to avoid dividing by zero


class Cut(NamedTuple):
    """A matrix of which this rank updates consecutive elements, or none."""

    shape: torch.Size
    start: int  # index of the first element in the flattened matrix
    offset: int  # and in the optimiser's flattened tensor
    size: int

    def of(self, home: Tensor) -> Tensor:
        """Return a 1-D view of these elements in a tensor shaped like the optimiser's."""
        return home.view(-1).narrow(0, self.offset, self.size)


Join = Callable[[Tensor, Cut], Tensor]  # this rank's elements of a matrix -> the full matrix, on every rank


def uncut(elements: Tensor, cut: Cut) -> Tensor:
    """Join for unsharded matrices, which every rank holds in full."""
    return elements.view(cut.shape)


def linear_maps(network: nn.Module) -> list[nn.Parameter]:
    """Collect the weights for Muon. Embedding and position tables are excluded: they are looked up or added, not
    multiplied."""
    found = []
    for module in network.modules():
        if isinstance(module, nn.Linear):
            found.append(module.weight)
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.append(module.in_proj_weight)
    return [p for p in dict.fromkeys(found) if p.requires_grad]


def orthogonal(matrix: Tensor) -> Tensor:
    """Approximate U V^T of matrix = U S V^T, in bfloat16: Newton-Schulz X <- a X + (b X X^T + c (X X^T)^2) X."""
    a, b, c = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16()
    x = x.T if tall else x  # so that the Gram matrix is the smaller of the two
    x = x / x.norm().clamp(min=TINIEST)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


@torch.no_grad()
def muon_step(
    home: Tensor, momentum: Tensor, cuts: list[Cut], join: Join, *, lr: float, weight_decay: float, beta: float
) -> None:
    """Update one tensor of weights by its gradient, in place. Every rank must call it for the same matrices.

    home: the tensor with this rank's elements of the matrices; momentum: one number per element of it.

        m <- beta m + (1 - beta) g,   W <- (1 - lr decay) W - 0.2 lr sqrt(max(A, B)) orthogonal((1 - beta) g + beta m)

    with W of A x B: steps of about the same size as AdamW's (Liu et al. 2025, eq. 4).
    """
    gradient = home.grad
    assert gradient is not None
    momentum.lerp_(gradient, 1 - beta)
    ahead = gradient.lerp(momentum, beta)  # Nesterov momentum
    for cut in cuts:
        direction = orthogonal(join(cut.of(ahead).bfloat16(), cut)).flatten()
        weights, scale = cut.of(home), 0.2 * math.sqrt(max(cut.shape))
        weights.mul_(1 - lr * weight_decay)
        weights.add_(direction[cut.start : cut.start + cut.size].to(home.device), alpha=-lr * scale)
