"""An average that was never kept, as a mixture of snapshots of others. Karras et al. 2023 (arXiv 2312.02696), section
3.2."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ldm.training.optim.power_profile import PowerProfile, overlap


class Snapshot(NamedTuple):
    """An average as it was after `step` updates, of a power profile of this length."""

    step: int
    length: float


class Mixture(NamedTuple):
    shares: list[float]  # of the snapshots, in their order
    error: float  # of the profile that they make, relative to the one that was asked for


def mixture(snapshots: Sequence[Snapshot], wanted: Snapshot) -> Mixture:
    """The shares whose mixture comes nearest to the wanted profile: least squares over all of training.

    With p_i a snapshot's profile and p the wanted one it solves A x = b, A_ij = <p_i, p_j>, b_i = <p_i, p>, and makes
    the shares add up to 1, so that what is left over shrinks no weight. Karras et al. 2023, appendix C. Snapshots of
    after the wanted step may help too. Raises ValueError if there are none.
    """
    if not snapshots:
        raise ValueError("there are no snapshots to mix")
    ends = [(PowerProfile(s.length).gamma, float(s.step)) for s in (*snapshots, wanted)]
    products = torch.tensor([[overlap(*one, *other) for other in ends] for one in ends], dtype=torch.float64)
    a, b, square = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    shares = torch.linalg.lstsq(a, b[:, None], driver="gelsd").solution[:, 0]
    shares = shares / shares.sum()
    left = square - 2 * shares @ b + shares @ a @ shares  # || sum of x_i p_i - p ||^2
    return Mixture(shares.tolist(), math.sqrt(max(0.0, (left / square).item())))
