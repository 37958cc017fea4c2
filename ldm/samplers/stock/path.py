"""The nodes that a scheduler of diffusers' visits, as a path that networks and image-to-image can use."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ldm.diffusion.nodes import Node


class _Row(NamedTuple):
    alpha: float
    sigma: float
    timestep: float


class StockPath:
    """A variance-preserving path that is known only at its nodes.

    There the network's timestep and the noise level are stated separately, because diffusers rounds timesteps and not
    levels. A node's time is a key: near (timestep + 1) / N, and never that of another node.

    sigma_data: the deviation of the data at the start. diffusers' schedulers after k-diffusion begin with sigma n on
    grids that start at the noisiest timestep, as if there were no data (0), and all others with n (1).
    """

    kind = "stock"

    def __init__(self, entries: int, *, sigma_data: float) -> None:
        self.entries, self.sigma_data = entries, sigma_data
        self._rows: dict[float, _Row] = {}

    def add(self, position: float, alpha: float, sigma: float, timestep: float) -> Node:
        """Add a node near this timestep, unless it is there, and return it."""
        row, key = _Row(alpha, sigma, timestep), (position + 1) / self.entries
        while self._rows.get(key, row) != row:
            key = math.nextafter(key, 0)
        self._rows[key] = row
        return Node(torch.tensor(key, dtype=torch.float64), alpha, sigma)

    def add_level(self, position: float, kappa: float, timestep: float) -> Node:
        """Add the node of a level sigma / alpha."""
        alpha, sigma = parts_of(kappa)
        return self.add(position, alpha, sigma, timestep)

    def alpha(self, t: Tensor) -> Tensor:
        return t.new_tensor(self._row(t).alpha)

    def sigma(self, t: Tensor) -> Tensor:
        return t.new_tensor(self._row(t).sigma)

    def timesteps(self, t: Tensor) -> Tensor:
        return t.new_tensor(self._row(t).timestep)

    def input_scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _row(self, t: Tensor) -> _Row:
        return self._rows[float(t)]


def parts_of(kappa: float) -> tuple[float, float]:
    """Return alpha and sigma, alpha^2 + sigma^2 = 1, of kappa = sigma / alpha."""
    alpha = 1 / math.sqrt(1 + kappa**2)
    return alpha, kappa * alpha
