"""What CLIP is trained on: pictures that are shifted, each place as often as any other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.loader import Batch
from ldm.training import clip_task

PICTURES, SHIFT = 20_000, 4
# The 99.99% quantile of chi-square with 80 degrees of freedom: 9 x 9 places, less one.
MOST = 133.0


class Stop(Exception):
    """Ends losses() where the shifted pictures are known."""


def test_every_shift_is_as_likely_as_any_other(monkeypatch: pytest.MonkeyPatch):
    """Both axes together, so that they are independent, too."""
    found: list[Tensor] = []

    def shifted(pixels: Tensor, offsets: Tensor, largest: int) -> Tensor:
        assert (offsets >= 0).all() and (offsets < 1).all()
        found.append((offsets * (2 * largest + 1)).long())  # as text.clip.shifted does
        raise Stop

    monkeypatch.setattr(clip_task, "shifted", shifted)
    task: Any = object.__new__(clip_task.CLIPTask)
    task.config = SimpleNamespace(run=SimpleNamespace(seed=3), shift=SHIFT)
    batch = Batch({"pixels": torch.zeros(1)}, list(range(PICTURES)), [], [])
    with pytest.raises(Stop):
        task.losses(None, batch, 0)
    side = 2 * SHIFT + 1
    places = torch.bincount(found[0][:, 0] * side + found[0][:, 1], minlength=side**2)
    expected = PICTURES / side**2
    assert ((places - expected).square() / expected).sum() < MOST
