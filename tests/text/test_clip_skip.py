"""Clip skip: the layer whose output is the context."""

from dataclasses import replace

import pytest
import torch

from text import OpenClipTextEncoder, TextEncoderConfig, TransformersTextEncoder

SD1 = TextEncoderConfig(width=16, layers=4, heads=2, intermediate_size=32, projection_dim=None)
SD2 = replace(SD1, layers=24, activation="gelu", hidden="penultimate", pad_id=0)
STORED = replace(SD2, layers=23, hidden="last")  # as in diffusers' folder
IDS = torch.tensor([[49406, 320, 2368, 49407, 49407]])


def built(config: TextEncoderConfig) -> TransformersTextEncoder:
    torch.manual_seed(0)
    return TransformersTextEncoder(config).eval().requires_grad_(False)


def states(encoder: TransformersTextEncoder, layer: int) -> torch.Tensor:
    """As A1111 and diffusers: the hidden states from the end, then the final layer norm."""
    output = encoder.model(input_ids=IDS, output_hidden_states=True)
    return encoder.model.final_layer_norm(output.hidden_states[-layer])


@pytest.mark.parametrize("skip", [1, 2, 3, 4])
def test_stable_diffusion_1_counts_as_a1111(skip: int):
    encoder = built(SD1)
    found = encoder(IDS, clip_skip=skip)
    assert torch.equal(found.context, states(encoder, skip))
    assert torch.equal(found.pooled, encoder(IDS).pooled)


@pytest.mark.parametrize(("skip", "layer"), [(None, 2), (1, 2), (2, 2), (3, 3), (24, 24)])
def test_stable_diffusion_2_begins_at_the_layer_before_the_last(skip: int | None, layer: int):
    """ComfyUI's CLIPSetLastLayer -3 is its third from the end; A1111 never takes the last."""
    encoder = built(SD2)
    assert torch.equal(encoder(IDS, clip_skip=skip).context, states(encoder, layer))


@pytest.mark.parametrize(("skip", "layer"), [(None, 2), (1, 1), (2, 2), (4, 4)])
def test_a_model_that_was_trained_with_clip_skip_2_may_be_asked_for_another_layer(skip: int | None, layer: int):
    encoder = built(replace(SD1, hidden="penultimate"))
    assert torch.equal(encoder(IDS, clip_skip=skip).context, states(encoder, layer))


@pytest.mark.parametrize("skip", [None, 1, 2, 3, 24])
def test_a_folder_without_the_last_layer_counts_alike(skip: int | None):
    whole, stored = built(SD2), built(STORED)
    stored.load_state_dict({name: whole.state_dict()[name] for name in stored.state_dict()})
    assert torch.allclose(stored(IDS, clip_skip=skip).context, whole(IDS, clip_skip=skip).context, atol=1e-6)


@pytest.mark.parametrize(("config", "most"), [(SD1, 4), (SD2, 24), (STORED, 24)])
def test_more_layers_than_there_are(config: TextEncoderConfig, most: int):
    encoder = built(config)
    encoder(IDS, clip_skip=most)
    for skip in (0, most + 1):
        with pytest.raises(ValueError, match=f"clip skip is {skip}, expected 1 to {most}, the text encoder's layers"):
            encoder(IDS, clip_skip=skip)


def test_open_clip_counts_alike():
    import open_clip

    torch.manual_seed(0)
    tower = open_clip.model.TextTransformer(width=16, layers=3, heads=2, mlp_ratio=2)
    encoder = OpenClipTextEncoder(tower.eval(), hidden="penultimate")
    second, third = encoder(IDS, clip_skip=2).context, encoder(IDS, clip_skip=3).context
    assert torch.equal(second, encoder(IDS).context) and not torch.allclose(second, third)
