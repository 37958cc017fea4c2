"""Random numbers of training: a function of only (run seed, position in the global order of samples)."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from ldm.diffusion.objective import ObjectiveConfig, TimeNumbers, input_perturbation, offset_noise


class SampleRandomness(NamedTuple):
    """Random numbers of B samples: eps standard normal, B x latent shape; uniforms in [0, 1), B each. Float32, CPU."""

    eps: Tensor
    time_uniforms: Tensor
    drop_uniforms: Tensor


def sample_randomness(seed: int | str, positions: Sequence[int], latent_shape: Sequence[int]) -> SampleRandomness:
    """Draw the noise, time and caption-drop numbers of the samples at these positions.

    A sample's numbers do not depend on its batch, so they are the same if a run is resumed, or continued on another
    number of ranks. (PyTorch's CPU generator uses 32 bits of its seed: two given samples get the same numbers with
    probability 2^-32, which does not affect training.)
    """
    eps = torch.empty(len(positions), *latent_shape)
    uniforms = torch.empty(len(positions), 2)
    generator = torch.Generator()
    for row, position in enumerate(positions):
        generator.manual_seed(mixed_seed(seed, position))
        torch.rand(2, generator=generator, out=uniforms[row])
        torch.randn(eps.shape[1:], generator=generator, out=eps[row])
    return SampleRandomness(eps, uniforms[:, 0].clone(), uniforms[:, 1].clone())


def mixed_seed(seed: int | str, position: int) -> int:
    """Hash the pair to 63 bits; with a sum instead, runs would repeat each other's noise."""
    digest = blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def training_noise(
    config: ObjectiveConfig, eps: Tensor, *, seed: int, positions: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the noise in the target and the noise in x_t; both are eps, unless the objective adds more."""
    if config.offset_noise:
        channel_noise = sample_randomness(f"{seed} offset", positions, eps.shape[1:2]).eps
        eps = offset_noise(eps, channel_noise, config.offset_noise)
    if not config.input_perturbation:
        return eps, eps
    more = sample_randomness(f"{seed} perturbation", positions, eps.shape[1:]).eps
    return eps, input_perturbation(eps, more, config.input_perturbation)


def keyed_uniform(*key: object) -> float:
    """Hash a key to a number in [0, 1)."""
    digest = blake2b(repr(key).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def spread_uniforms(
    kind: TimeNumbers, uniforms: Tensor, positions: Sequence[int], *, batch_size: int, seed: int
) -> Tensor:
    """Return uniform numbers for the times of these samples, spread more evenly than independent ones, float32.

    stratified: one in each B-th of [0, 1) over the global batch of B, with a common random shift. Kingma et al. 2021
    (arXiv 2107.00630), appendix I.1. sobol: a low-discrepancy sequence over the entire run, in one dimension van der
    Corput's, with one random shift. Both are functions of seed and position, and each single number is uniform.
    """
    match kind:
        case "independent":
            return uniforms.float()
        case "stratified":
            numbers = [
                keyed_uniform("stratified", seed, p // batch_size) + p % batch_size / batch_size for p in positions
            ]
        case "sobol":
            numbers = [keyed_uniform("sobol", seed) + van_der_corput(p) for p in positions]
        case _:
            assert_never(kind)
    # Avoid rounding up to 1.0 in float32, as torch.rand does.
    return (torch.tensor(numbers, dtype=torch.float64) % 1).float().clamp(max=1 - 2**-24)


def van_der_corput(index: int) -> float:
    """Mirror the index's binary digits at the radix point: 1, 2, 3, ... -> 1/2, 1/4, 3/4, ..."""
    return int(f"{index:064b}"[::-1], 2) / 2**64


def drop_captions(captions: Sequence[str], uniforms: Tensor, fraction: float) -> list[str]:
    """The captions, that fraction of them replaced by "": each where its own number in [0, 1), B, is below `fraction`.

    So one network learns the unconditional answer too, which guidance needs. Ho & Salimans 2022, algorithm 1.
    """
    return ["" if drop else caption for drop, caption in zip(uniforms < fraction, captions, strict=True)]
