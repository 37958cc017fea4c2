"""Losses by importance."""

from types import SimpleNamespace
from typing import Any

import torch

from ldm.diffusion import LossHistory
from ldm.diffusion.importance import BINS, KEPT
from ldm.training.denoiser_task import by_importance


def test_losses_count_less_where_times_are_drawn_more_often_and_all_are_remembered_in_order():
    """Positions beyond 2^24, which float32 cannot tell apart, and another rank's between ours."""
    history = LossHistory()
    centres = (torch.arange(BINS) + 0.5) / BINS
    for _ in range(KEPT):
        history.record(centres, 1 + 3 * centres)
    numbers, losses = torch.tensor([0.105, 0.905]), torch.tensor([2.0, 4.0], requires_grad=True)
    density, rows = history.density(numbers), []

    def gather(mine: torch.Tensor) -> torch.Tensor:
        rows.append(mine)
        return torch.cat([mine, torch.tensor([[2.0**24 + 2, 0.105, 7.0]], dtype=torch.float64)])

    world: Any = SimpleNamespace(device="cpu", gather=gather)
    counted = by_importance(losses, numbers, [2**24 + 1, 2**24 + 3], history, world)
    assert torch.allclose(counted, losses / density) and counted.requires_grad
    assert density[0] < 0.6 and density[1] > 1.3
    assert rows[0][:, 0].tolist() == [2**24 + 1, 2**24 + 3]
    assert history.losses[10, :2].tolist() == [2.0, 7.0] and history.losses[90, 0] == 4.0


def test_a_batch_that_the_engine_will_skip_is_not_remembered():
    history = LossHistory()
    world: Any = SimpleNamespace(device="cpu", gather=lambda rows: rows)
    by_importance(torch.tensor([1.0, float("nan")]), torch.tensor([0.1, 0.9]), [0, 1], history, world)
    assert sum(history.seen) == 0
    by_importance(torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.9]), [2, 3], history, world)
    assert sum(history.seen) == 2
