"""From captions to what a denoiser is told."""

import pytest
import torch
from helpers.stable_diffusion import stirred

from ldm.model.conditioner import Conditioner, TextTower
from text import TextEncoderConfig, Tokenizer, TransformersTextEncoder


def tower(width: int, *, length: int = 16, seed: int = 0) -> TextTower:
    config = TextEncoderConfig(
        width=width, layers=1, heads=2, intermediate_size=8, context_length=length, projection_dim=8
    )
    return TextTower(stirred(TransformersTextEncoder(config), by=0.1, seed=seed), Tokenizer(config.tokenizer))


def test_one_tower_says_what_its_encoder_says():
    one = tower(8)
    conditioner = Conditioner(one)
    found = conditioner(["a red apple", ""])
    expected = one.encoder(one.tokenizer(["a red apple", ""]))
    assert torch.equal(found.context, expected.context) and torch.equal(found.pooled, expected.pooled)
    assert torch.equal(found.mask, expected.mask) and found.concat is None
    assert (conditioner.width, conditioner.context_length) == (8, 16)


def test_two_towers_are_joined_along_their_width():
    first, second = tower(8), tower(12, seed=1)
    both = Conditioner(first, second)
    assert both.width == 20
    for weighting in ("none", "a1111"):
        found = both(["a (red:1.3) apple"], weighting)
        alone = [Conditioner(one)(["a (red:1.3) apple"], weighting) for one in (first, second)]
        assert torch.equal(found.context, torch.cat([one.context for one in alone], dim=2))
        assert torch.equal(found.pooled, torch.cat([one.pooled for one in alone], dim=1))
        assert torch.equal(found.mask, alone[0].mask)


def test_towers_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"the text encoders read \[16, 8\] tokens, expected the same length"):
        Conditioner(tower(8), tower(8, length=8))


def test_captions_are_batched_by_their_length():
    conditioner = Conditioner(tower(8))
    long = " ".join(["apple"] * 20)
    captions = ["a", "b", "c", long, "d"]
    assert conditioner.batches(captions, "none", largest=2) == [["a", "b"], ["c", long], ["d"]]
    assert conditioner.batches(captions, "a1111", largest=2) == [["a", "b"], ["c"], [long], ["d"]]
    assert conditioner.cut_off("a") == "" and conditioner.cut_off(long).startswith("apple")
