"""Moving averages of weights, and averages reconstructed from snapshots of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.files.messages import describe_misfit


@dataclass(frozen=True)
class WarmedUp:
    """Decay min(decay, (1 + n) / (10 + n)) at update n, so that the average quickly forgets the initial weights."""

    decay: float  # in [0, 1)

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1, not {self.decay}; 0.9999 is usual")

    def __call__(self, n: int) -> float:
        return min(self.decay, (1 + n) / (10 + n))


class EMA:
    """Float32 averages ("shadows") of named tensors of any dtype: in bfloat16, small changes would be rounded away.

    Update n = 1, 2, ...: shadow += (1 - d) (value - shadow), d = profile(n). The tensors may be full weights or the
    shards that a rank owns.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], profile: Callable[[int], float]) -> None:
        """Initialise the shadows as copies, on the tensors' devices."""
        self.profile = profile
        self.updates = 0
        self.shadow = {name: value.detach().float().clone() for name, value in named_parameters}

    @torch.no_grad()
    def update(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        """Move the shadows towards the tensors, which must have the initial names and shapes, in any order."""
        values = dict(named_parameters)
        self._check_matches(values)
        self.updates += 1
        decay = self.profile(self.updates)
        sources = [values[name].float() for name in self.shadow]
        shadows = list(self.shadow.values())
        torch._foreach_lerp_(shadows, sources, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates and the shadows, not copies. The profile belongs to the config."""
        return {"updates": self.updates, "shadow": self.shadow}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a saved state into the shadows, in place; names and shapes must match."""
        self._check_matches(state["shadow"])
        self.updates = state["updates"]
        for name, shadow in self.shadow.items():
            shadow.copy_(state["shadow"][name])

    def _check_matches(self, values: Mapping[str, Tensor]) -> None:
        shapes, given = ({name: t.shape for name, t in named.items()} for named in (self.shadow, values))
        if misfit := describe_misfit(shapes, given):
            raise ValueError(f"the EMA is of other tensors, {misfit}: use the model that it was made for")


# Profiles whose length grows with the run: weights count by a power of their time. Karras et al. 2023
# (arXiv 2312.02696), section 3.1.
SHORTEST = 1e-4  # one step in ten thousand
LONGEST = 12**-0.5  # relative length of the plain mean over all of training, gamma = 0


@dataclass(frozen=True)
class PowerProfile:
    """A power profile. length: its standard deviation relative to the training so far; 0.05 and 0.1 are usual.

    The random initial weights have no influence: the first update is a copy.
    """

    length: float

    def __post_init__(self) -> None:
        if not SHORTEST <= self.length < LONGEST:
            raise ValueError(
                f"the EMA's length is {self.length}, expected {SHORTEST:g} or more and less than {LONGEST:.3f}"
            )

    @cached_property
    def gamma(self) -> float:
        return gamma_of_length(self.length)

    def __call__(self, n: int) -> float:
        """beta = (1 - 1 / n)^(gamma + 1) at update n = 1, 2, .... Karras et al. 2023, eq. 2."""
        return (1 - 1 / n) ** (self.gamma + 1)


def length_of_gamma(gamma: float) -> float:
    """sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)): standard deviation of p(t) ~ t^gamma on [0, 1]. Their eq. 3."""
    return (gamma + 1) ** 0.5 / ((gamma + 2) * (gamma + 3) ** 0.5)


def gamma_of_length(length: float) -> float:
    """The largest root of gamma^3 + 7 gamma^2 + (16 - length^-2) gamma + 12 - length^-2 = 0: their eq. 3 solved."""
    power = length**-2
    companion = torch.tensor([[-7.0, power - 16, power - 12], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    return torch.linalg.eigvals(companion).real.max().item()


def overlap(gamma: float, end: float, other_gamma: float, other_end: float) -> float:
    """Integral of p(t) p'(t) over t, p(t) = (gamma + 1) t^gamma / end^(gamma + 1) up to `end`. Their appendix C."""
    if end > other_end:
        return overlap(other_gamma, other_end, gamma, end)
    both = (gamma + 1) * (other_gamma + 1) / ((gamma + other_gamma + 1) * other_end)
    return both * (end / other_end) ** other_gamma


class Snapshot(NamedTuple):
    """An average after `step` updates, with a power profile of this length."""

    step: int
    length: float


class Mixture(NamedTuple):
    shares: list[float]  # coefficients of the snapshots, in order; they add up to 1
    error: float  # of the resulting profile, relative to the wanted one


def mixture(snapshots: Sequence[Snapshot], wanted: Snapshot) -> Mixture:
    """Find the coefficients of the mixture closest to the wanted profile: least squares over all of training.

    It reconstructs an average that was not kept (Karras et al. 2023, section 3.2).

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
