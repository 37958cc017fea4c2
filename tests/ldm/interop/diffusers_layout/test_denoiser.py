"""Denoisers in diffusers' layout: what is written opens there, and what they write opens here."""

import json
from typing import Any

import pytest
import torch

from ldm.denoisers import Condition, DiTConfig, UNetConfig
from ldm.interop.diffusers_layout.denoiser import layout_of, load_denoiser, save_denoiser
from ldm.model.components import LoadedDenoiser

DIT = DiTConfig(depth=2, width=32, heads=4, sample_size=8, interpolation_scale=2.0)
UNETS = [
    UNetConfig(
        block_out_channels=(16, 32), layers_per_block=1, attention_levels=(False, True), heads=2, norm_num_groups=8
    ),
    UNetConfig(
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        attention_levels=(True, True, False),
        heads=(2, 4, 8),
        use_linear_projection=True,
        norm_num_groups=16,
    ),
]
SIZES: dict[str, Any] = {"sample_size": 8, "context_width": 12}


def inputs():
    generator = torch.Generator().manual_seed(3)
    context = torch.randn(2, 5, 12, generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    return torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([3.0, 700.0]), context, mask


def random_denoiser(config, *, learned_variance=False):
    torch.manual_seed(0)
    denoiser = config.build(latent_channels=4, context_width=12, learned_variance=learned_variance)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return denoiser.eval()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("config", [DIT, *UNETS], ids=["dit", "sd1", "sd2"])
def test_a_denoiser_comes_back_bit_for_bit(config, learned, tmp_path):
    denoiser = random_denoiser(config, learned_variance=learned)
    save_denoiser(LoadedDenoiser(denoiser, config, **SIZES), tmp_path)
    loaded, *found = load_denoiser(tmp_path)
    assert found == [config, 8, 12] and loaded.learned_variance == learned and loaded.latent_channels == 4
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    weights = denoiser.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in loaded.state_dict().items())
    x, t, context, mask = inputs()
    with torch.no_grad():
        condition = Condition(context, mask, context[:, 0])
        ours, theirs = loaded(x, t, condition), denoiser(x, t, condition)
    assert torch.equal(ours.prediction, theirs.prediction)
    assert learned == (ours.variance is not None) and (not learned or torch.equal(ours.variance, theirs.variance))


@pytest.mark.parametrize("config", [DIT, *UNETS], ids=["dit", "sd1", "sd2"])
def test_diffusers_opens_it_and_computes_the_same(config, tmp_path):
    from diffusers import PixArtTransformer2DModel, UNet2DConditionModel

    denoiser = random_denoiser(config)
    save_denoiser(LoadedDenoiser(denoiser, config, **SIZES), tmp_path)
    x, t, context, mask = inputs()
    with torch.no_grad():
        ours = denoiser(x, t, Condition(context, mask, context[:, 0])).prediction
        if layout_of(config).folder == "unet":
            theirs = UNet2DConditionModel.from_pretrained(tmp_path)(x, t, context).sample
        else:
            network = PixArtTransformer2DModel.from_pretrained(tmp_path)
            theirs = network(x, context, timestep=t, encoder_attention_mask=mask, added_cond_kwargs={}).sample
    assert ours.std() > 0.01
    assert (ours - theirs).abs().max() <= 1e-5


def test_half_precision_halves_the_file(tmp_path):
    denoiser = random_denoiser(DIT)
    sizes = []
    for dtype in (torch.float32, torch.float16):
        save_denoiser(LoadedDenoiser(denoiser, DIT, **SIZES), tmp_path / str(dtype), dtype=dtype)
        sizes.append((tmp_path / str(dtype) / "diffusion_pytorch_model.safetensors").stat().st_size)
    assert sizes[1] < 0.6 * sizes[0]
    loaded, *_ = load_denoiser(tmp_path / "torch.float16")
    assert next(loaded.parameters()).dtype == torch.float32


def test_another_kind_of_network_is_refused(tmp_path):
    save_denoiser(LoadedDenoiser(random_denoiser(UNETS[0]), UNETS[0], **SIZES), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["down_block_types"][0] = "AttnDownBlock2D"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="AttnDownBlock2D"):
        load_denoiser(tmp_path)
    content["_class_name"] = "SD3Transformer2DModel"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json describes 'SD3Transformer2DModel', expected UNet2D"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (DIT, {"activation_fn": "geglu"}, r"config\.json has activation_fn 'geglu', expected 'gelu-approximate'"),
        (UNETS[0], {"flip_sin_to_cos": False}, r"flip_sin_to_cos False, expected True"),
        (UNETS[0], {"resnet_time_scale_shift": "scale_shift"}, r"expected 'default'"),
    ],
)
def test_what_would_load_and_compute_wrongly_is_refused(config, change, message, tmp_path):
    save_denoiser(LoadedDenoiser(random_denoiser(config), config, **SIZES), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load_denoiser(tmp_path)


@pytest.mark.parametrize("config", [DIT, UNETS[0]], ids=["dit", "unet"])
@pytest.mark.parametrize("key", ["sample_size", "in_channels"])
def test_a_config_without_a_key_names_it(config, key, tmp_path):
    save_denoiser(LoadedDenoiser(random_denoiser(config), config, **SIZES), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content[key]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"config.json lacks the key '{key}'"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (UNETS[0], {"block_out_channels": None}),
        (UNETS[0], {"layers_per_block": [1, 2]}),
        (UNETS[0], {"attention_head_dim": "8"}),
        (DIT, {"num_layers": "two"}),
        (DIT, {"sample_size": None}),
    ],
)
def test_a_config_with_a_value_of_another_kind_names_the_file(config, change, tmp_path):
    save_denoiser(LoadedDenoiser(random_denoiser(config), config, **SIZES), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json (holds a value of another|has \w+ .*, expected whole)"):
        load_denoiser(tmp_path)
