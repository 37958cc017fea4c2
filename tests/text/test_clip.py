"""The small CLIP's own parts: moving pictures, counting what is found, and the sizes that a configuration asks for."""

import pytest
import torch
from torch.nn import functional as F

from text import TextEncoderConfig
from text.clip import ImageTowerConfig, build_clip, features, recall, shifted

TEXT = TextEncoderConfig(
    width=16, layers=1, heads=2, intermediate_size=32, context_length=8, activation="gelu", projection_dim=12
)


def test_a_picture_is_moved_by_whole_pixels_over_its_edge():
    picture = torch.zeros(1, 1, 6, 6)
    picture[0, 0, 2, 3] = 1.0
    for offsets, place in {(0.5, 0.5): (2, 3), (0.0, 0.5): (4, 3), (0.99, 0.0): (0, 5)}.items():
        moved = shifted(picture, torch.tensor([offsets]), 2)
        assert moved.shape == picture.shape
        assert moved[0, 0].argmax() == place[0] * 6 + place[1]
        assert moved.sum() == 1
    edge = torch.ones(1, 3, 6, 6)
    assert torch.equal(shifted(edge, torch.tensor([[0.0, 0.99]]), 2), edge)


def test_each_picture_has_its_own_offset():
    pictures = torch.arange(36.0).view(1, 1, 6, 6).expand(2, 1, 6, 6)
    moved = shifted(pictures, torch.tensor([[0.5, 0.5], [0.0, 0.0]]), 1)
    assert torch.equal(moved[0], pictures[0])
    assert not torch.equal(moved[1], pictures[1])


def test_recall_by_example():
    image = torch.eye(4)
    text = F.normalize(torch.tensor([[1.0, 0, 0, 0], [0.9, 0.8, 0, 0], [0, 0, 1, 0], [0.3, 0.2, 0.1, 0.05]]), dim=1)
    found = recall(image, text, ks=(1, 2, 4))
    assert (found["text_to_image_1"], found["text_to_image_2"], found["text_to_image_4"]) == (0.5, 0.75, 1.0)
    assert found["image_to_text_1"] == 1.0
    assert recall(image, image.roll(1, 0), ks=(1,))["text_to_image_1"] == 0.0


def test_features_that_are_no_numbers_find_nothing():
    broken = torch.full((5, 3), float("nan"))
    assert set(recall(broken, broken, ks=(1, 4)).values()) == {0.0}


def test_a_tower_of_the_sizes_asked_for():
    torch.manual_seed(0)
    model = build_clip(TEXT, ImageTowerConfig(timm_model="test_convnext", image_size=64, embed_dim=12))
    pixels, tokens = torch.randn(3, 3, 64, 64), torch.randint(0, 49408, (3, 8))
    model.train()
    image, text = features(model, pixels, tokens)
    assert model.training
    assert image.shape == text.shape == (3, 12)
    torch.testing.assert_close(image.norm(dim=1), torch.ones(3))
    assert not image.requires_grad


def test_an_unknown_tower_is_named():
    with pytest.raises(ValueError, match="'convnxt'"):
        build_clip(TEXT, ImageTowerConfig(timm_model="convnxt"))
