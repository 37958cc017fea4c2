"""Random generators go on where a checkpoint was written."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.training.checkpoints.train_state import generator_states, restore_generators, seed_generators

DRAWS: dict[str, Callable[[], object]] = {
    "cpu": lambda: torch.randn(7).tolist() + torch.randperm(5).tolist(),
    "python": lambda: [random.random(), random.gauss(0, 1), random.getrandbits(40)],
    "numpy": lambda: np.random.standard_normal(3).tolist() + np.random.randint(0, 99, 3).tolist(),
}


@pytest.fixture(autouse=True)
def undisturbed() -> Iterator[None]:
    """Other tests draw what they would have drawn."""
    before = generator_states()
    yield
    restore_generators(before)


def draw_all(times: int = 5) -> dict[str, list[object]]:
    return {name: [draw() for _ in range(times)] for name, draw in DRAWS.items()}


def through_a_file(path: Path) -> None:
    save_file(generator_states(), path)


@pytest.mark.parametrize("used", range(6))
def test_what_is_drawn_after_a_checkpoint_is_drawn_again(tmp_path: Path, used: int):
    """Wherever it stands: Gaussian numbers are made in pairs, of which one may be kept for the next call."""
    for _ in range(used):
        torch.randn(1)
        random.gauss(0, 1)
        np.random.standard_normal()
    through_a_file(tmp_path / "states.safetensors")
    expected = draw_all()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    assert all(draw_all()[name] != expected[name] for name in DRAWS)
    restore_generators(load_file(tmp_path / "states.safetensors"))
    assert draw_all() == expected


@pytest.mark.parametrize("name", DRAWS)
def test_only_what_there_is_a_state_of_is_restored(name: str):
    state = generator_states()[name]
    first, second = draw_all(), draw_all()
    restore_generators({name: state})
    again = draw_all()
    assert again[name] == first[name]
    assert all(again[other] not in (first[other], second[other]) for other in DRAWS if other != name)


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 7, 2**63 - 1])
def test_a_seed_starts_all_of_them(seed: int):
    """From where they always start with it, and not from where another does."""
    seed_generators(seed)
    first = draw_all()
    seed_generators(seed)
    assert draw_all() == first
    seed_generators(seed + 1 if seed < 2**63 - 1 else 5)
    assert all(draw_all()[name] != first[name] for name in DRAWS)


def test_a_state_is_a_copy():
    kept = generator_states()
    then = {name: state.clone() for name, state in kept.items()}
    draw_all()
    assert all(torch.equal(kept[name], then[name]) for name in then)
