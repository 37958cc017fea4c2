"""Encoding training pictures: the same numbers whether they are kept or made anew."""

import torch

from data.loader import Batch
from ldm.training.denoiser_setup import LatentEncoder
from vae import AutoencoderKL, AutoencoderKLConfig


def batch(samples: list[int]) -> Batch:
    pixels = torch.stack([torch.full((3, 8, 8), sample / 10) for sample in samples])
    keys = [f"0.tar:{sample}" for sample in samples]
    columns = {"pixels": pixels, "captions": ["x"] * len(samples)}
    return Batch(columns, samples, [(0, sample) for sample in samples], keys)


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(AutoencoderKLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)).eval()


def test_kept_latents_are_those_encoded_anew():
    network = vae()
    keep, anew = (LatentEncoder(network, keep=choice, bf16=False) for choice in (True, False))
    noise = torch.randn(3, 4, 4, 4)
    keep(batch([0, 1, 2]), noise)
    torch.testing.assert_close(keep(batch([2, 4, 0]), noise), anew(batch([2, 4, 0]), noise), atol=1e-5, rtol=1e-5)


def test_a_picture_that_is_kept_is_not_encoded_again(monkeypatch):
    network = vae()
    encoder = LatentEncoder(network, keep=True, bf16=False)
    seen = []
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    for samples in ([0, 1, 2], [1, 3], [0, 3]):
        encoder.moments(batch(samples))
    assert seen == [3, 2]


def test_what_is_kept_depends_on_no_visit_before():
    """A run that is resumed in the middle of an epoch meets its pictures again in other company."""
    network = vae()
    whole, resumed = (LatentEncoder(network, keep=True, bf16=False) for _ in range(2))
    for samples in ([0, 1, 2, 3], [4, 5, 6, 7]):
        whole.moments(batch(samples))
    resumed.moments(batch([4, 5, 6, 7]))
    mixed = batch([0, 5, 6, 7])
    assert torch.equal(whole.moments(mixed).mean, resumed.moments(mixed).mean)


def test_the_noise_moves_the_latents_by_the_posteriors_deviation():
    network = vae()
    encoder = LatentEncoder(network, keep=True, bf16=False)
    moments = encoder.moments(batch([5]))
    ones = torch.ones(1, 4, 4, 4)
    torch.testing.assert_close(encoder(batch([5]), ones) - moments.mean, torch.exp(0.5 * moments.logvar))


def test_means_take_no_noise():
    encoder = LatentEncoder(vae(), keep=True, bf16=False, sample=False)
    found = encoder(batch([1, 2]), torch.randn(2, 4, 4, 4))
    assert torch.equal(found, encoder.moments(batch([1, 2])).mean)
