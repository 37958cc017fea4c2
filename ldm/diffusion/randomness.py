"""The random numbers of training, a function of (run seed, position in the global order of samples) alone."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor


class SampleRandomness(NamedTuple):
    """eps is standard normal, B x latent shape; the uniforms are in [0, 1), B each. Float32 on the CPU."""

    eps: Tensor
    time_uniforms: Tensor
    drop_uniforms: Tensor


def sample_randomness(seed: int, positions: Sequence[int], latent_shape: Sequence[int]) -> SampleRandomness:
    """Noise, time and caption-drop numbers of the samples at these positions.

    A sample's numbers do not depend on its batch, so a run that is resumed, or split among another number
    of ranks, sees the same ones. (PyTorch's CPU generator keeps 32 bits of its seed: two given samples
    share their numbers with probability 2^-32, which no training notices.)
    """
    eps = torch.empty(len(positions), *latent_shape)
    uniforms = torch.empty(len(positions), 2)
    generator = torch.Generator()
    for row, position in enumerate(positions):
        generator.manual_seed(mixed_seed(seed, position))
        torch.rand(2, generator=generator, out=uniforms[row])
        torch.randn(eps.shape[1:], generator=generator, out=eps[row])
    return SampleRandomness(eps, uniforms[:, 0].clone(), uniforms[:, 1].clone())


def mixed_seed(seed: int, position: int) -> int:
    """63 well-mixed bits of the pair; a sum of the two would let runs repeat each other's noise."""
    digest = blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
