"""Exponential moving average of weights."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
