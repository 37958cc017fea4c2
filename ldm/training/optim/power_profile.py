"""EMA profiles whose length grows with the run: weights count by a power of their time. Karras et al. 2023
(arXiv 2312.02696), section 3.1."""

from dataclasses import dataclass
from functools import cached_property

import torch

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
