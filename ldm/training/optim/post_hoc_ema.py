"""Reconstruct an average that was not kept as a mixture of snapshots. Karras et al. 2023 (arXiv 2312.02696), section
3.2."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ldm.training.optim.power_profile import PowerProfile, overlap


class Snapshot(NamedTuple):
    """An average after `step` updates, with a power profile of this length."""

    step: int
    length: float


class Mixture(NamedTuple):
    shares: list[float]  # coefficients of the snapshots, in order; they add up to 1
    error: float  # of the resulting profile, relative to the wanted one


def mixture(snapshots: Sequence[Snapshot], wanted: Snapshot) -> Mixture:
    """Find the coefficients of the mixture closest to the wanted profile: least squares over all of training.

    With p_i a snapshot's profile and p the wanted one, solve A x = b, A_ij = <p_i, p_j>, b_i = <p_i, p>, and normalise
    x to sum to 1, so that the residual does not shrink the weights. Karras et al. 2023, appendix C. Snapshots from
    after the wanted step may help too. Raises ValueError if there are none.
    """
    if not snapshots:
        raise ValueError("there are no snapshots to mix")
    ends = [(PowerProfile(s.length).gamma, float(s.step)) for s in (*snapshots, wanted)]
    products = torch.tensor([[overlap(*one, *other) for other in ends] for one in ends], dtype=torch.float64)
    a, b, square = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    x = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
    x = x / x.sum()
    residual = square - 2 * x @ b + x @ a @ x  # || sum of x_i p_i - p ||^2
    return Mixture(x.tolist(), math.sqrt(max(0.0, (residual / square).item())))
