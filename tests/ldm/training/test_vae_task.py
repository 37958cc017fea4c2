"""The latents' statistics at the end of a training: over a bounded number of pictures, each rank a part of them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.loading import SIZES, images

from ldm.training import session as sessions
from ldm.training import vae_task
from ldm.training.session import Session
from vae.autoencoder import AutoencoderKL, AutoencoderKLConfig
from vae.losses import latent_statistics

BATCH, ALL = 4, sum(SIZES)


def fresh_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)).eval()


class Ranks:
    """Ranks that are threads: they add up their numbers together."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.given = ranks, {}
        self.barrier = threading.Barrier(ranks)

    def all_reduce(self, rank: int, numbers: list[float]) -> list[float]:
        self.given[rank] = numbers
        self.barrier.wait(60)
        return [sum(own) for own in zip(*self.given.values(), strict=True)]


class Measured:
    """What the ranks of one training measure, and what they read for it."""

    def __init__(self, shards: str, *, ranks: int = 1, stopped: bool = False) -> None:
        self.read: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
        self.log: list[str] = []
        self.shards, self.together, self.stopped = shards, Ranks(ranks), stopped
        with ThreadPoolExecutor(ranks) as pool:
            vaes = [fresh_vae() for _ in range(ranks)]
            self.configs = list(pool.map(self.complete, range(ranks), vaes))

    def complete(self, rank: int, vae: AutoencoderKL) -> AutoencoderKLConfig:
        ranks = self.together.ranks
        loader = images(self.shards, batch_size=BATCH, lanes=2, rank=rank, ranks=ranks)
        world: Any = SimpleNamespace(
            rank=rank, ranks=ranks, all_reduce=lambda numbers: self.together.all_reduce(rank, numbers)
        )
        config: Any = SimpleNamespace(data=loader.config, vae=vae.config)
        run: Any = SimpleNamespace(log=self.log.append)
        nothing: Any = None
        session = Session(config, world, run, loader, nothing, SimpleNamespace(requested=self.stopped), nothing)  # pyright: ignore[reportArgumentType]
        task: Any = object.__new__(vae_task.VAETask)
        task.session, task.config, task.device = session, config, torch.device("cpu")
        posterior = vae.posterior

        def noted(pixels: torch.Tensor) -> Any:
            colours = ((pixels[:, :2, 0, 0] + 1) * 127.5 / 10).round().long()  # (10 shard, 10 index, 255)
            self.read[rank] += [(shard, index) for shard, index in colours.tolist()]
            return posterior(pixels)

        vae.posterior = noted
        task.complete(vae)
        return vae.config

    @property
    def numbers(self) -> list[float]:
        """The statistics, which all ranks agree on."""
        assert all(config == self.configs[0] for config in self.configs)
        mean, std = self.configs[0].latent_mean, self.configs[0].latent_std
        assert mean is not None and std is not None
        return [*mean, *std]

    @property
    def pictures(self) -> list[tuple[int, int]]:
        """Shard and index of each picture that was read, as its colour tells them."""
        return sorted(place for own in self.read for place in own)


EVERY = [(shard, index) for shard, size in enumerate(SIZES) for index in range(size)]


def test_of_a_small_set_each_picture_counts_once(tiny_shards: Callable[..., str]):
    """As if the network had met all of them at once."""
    shards = tiny_shards(SIZES)
    found = Measured(shards)
    assert found.pictures == EVERY
    pixels = torch.cat([batch.pixels for batch in images(shards).once(ALL)])
    mean, std = latent_statistics(fresh_vae(), [pixels])
    assert found.numbers == pytest.approx([*mean, *std], rel=1e-5)


@pytest.mark.parametrize("most", [4096, 8])
def test_two_ranks_measure_what_one_does(tiny_shards: Callable[..., str], monkeypatch: pytest.MonkeyPatch, most: int):
    monkeypatch.setattr(vae_task, "STATISTICS_PICTURES", most)
    shards = tiny_shards(SIZES)
    one, two = (Measured(shards, ranks=ranks) for ranks in (1, 2))
    assert one.pictures == two.pictures and all(two.read)
    assert two.numbers == pytest.approx(one.numbers, rel=1e-5)


@pytest.mark.parametrize(("most", "read"), [(8, 8), (11, 8), (1, BATCH), (ALL, ALL)])
def test_of_a_large_set_a_bounded_number_is_read(
    tiny_shards: Callable[..., str], monkeypatch: pytest.MonkeyPatch, most: int, read: int
):
    """Of several shards, as they come in training: the first ones of a set may be of one kind."""
    monkeypatch.setattr(vae_task, "STATISTICS_PICTURES", most)
    found = Measured(tiny_shards(SIZES)).pictures
    assert len(found) == len(set(found)) == read
    assert len({shard for shard, _ in found}) > 1


def test_its_progress_is_logged(tiny_shards: Callable[..., str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sessions, "PROGRESS_SECONDS", 0.0)
    log = Measured(tiny_shards(SIZES)).log
    assert log[:-1] == [f"{seen} of 14 images are measured" for seen in (4, 8, 12, 14)]


def test_a_stop_signal_ends_it_early_on_all_ranks(tiny_shards: Callable[..., str]):
    """Each of which has begun: they still add up their numbers, and the run is not complete."""
    found = Measured(tiny_shards(SIZES), ranks=2, stopped=True)
    assert len(found.pictures) == 2 * BATCH


def test_only_the_configuration_of_the_network_changes(tiny_shards: Callable[..., str]):
    (config,) = Measured(tiny_shards(SIZES)).configs
    before = fresh_vae().config
    assert dataclasses.replace(config, latent_mean=before.latent_mean, latent_std=before.latent_std) == before
