import pytest
import torch
from helpers.denoisers import ask
from torch import Tensor, nn

from ldm.denoisers import DiT, DiTConfig
from ldm.denoisers.dit import DiTBlock

CONTEXT_WIDTH = 24
SMALL = DiTConfig(depth=2, width=32, heads=4, sample_size=8)
SCALED = DiTConfig(depth=1, width=32, heads=2, sample_size=12, patch_size=4, interpolation_scale=2)
LARGE_GRID = DiTConfig(depth=1, width=16, heads=2, sample_size=192, patch_size=8)  # scale 3


def diffusers_dit(config: DiTConfig) -> nn.Module:
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.width // config.heads,
        in_channels=4,
        out_channels=4,
        num_layers=config.depth,
        cross_attention_dim=config.width,
        caption_channels=CONTEXT_WIDTH,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        interpolation_scale=config.interpolation_scale,  # pyright: ignore[reportArgumentType]
        use_additional_conditions=False,
    ).eval()


def perturbed(network: nn.Module, noise: float = 0.05) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += noise * torch.randn_like(parameter)
    return network


def make_inputs(size: tuple[int, int] = (8, 8)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, *size, generator=generator)
    context = torch.randn(2, 7, CONTEXT_WIDTH, generator=generator)
    mask = torch.arange(7) < torch.tensor([[3], [7]])
    return x, torch.tensor([3.7, 951.0]), context, mask, torch.randn(2, CONTEXT_WIDTH, generator=generator)


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def build(config: DiTConfig) -> DiT:
    network = config.build(latent_channels=4, context_width=CONTEXT_WIDTH)
    assert isinstance(network, DiT)
    return network


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "size"),
    [
        (SMALL, (8, 8)),
        (SMALL, (12, 12)),
        (SMALL, (6, 14)),
        (SCALED, (12, 12)),
        (SCALED, (8, 16)),
        (LARGE_GRID, (192, 192)),
        (LARGE_GRID, (64, 96)),
    ],
    ids=lambda value: f"of {value.sample_size}" if isinstance(value, DiTConfig) else f"{value[0]}x{value[1]}",
)
def test_equals_diffusers_with_a_caption_mask(config, size):
    torch.manual_seed(0)
    ours, theirs = perturbed(build(config)), diffusers_dit(config)
    assert shapes(ours) == shapes(theirs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, t, context, mask, pooled = make_inputs(size)
    out = ask(ours, x, t, context, mask, pooled)
    expected = theirs(x, encoder_hidden_states=context, timestep=t, encoder_attention_mask=mask).sample
    assert out.std() > 0.1
    assert (out - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_weights_of_diffusers_load_into_ours():
    torch.manual_seed(0)
    theirs, ours = perturbed(diffusers_dit(SMALL)), build(SMALL)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, t, context, mask, pooled = make_inputs()
    expected = theirs(x, encoder_hidden_states=context, timestep=t, encoder_attention_mask=mask).sample
    assert (ask(ours, x, t, context, mask, pooled) - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_built_on_the_meta_device_it_still_has_its_positions():
    torch.manual_seed(0)
    network = perturbed(build(SMALL))
    with torch.device("meta"):
        empty = build(SMALL)
    empty.load_state_dict(network.state_dict(), strict=True, assign=True)
    assert torch.equal(ask(empty, *make_inputs()), ask(network, *make_inputs()))


def test_fresh_network_returns_exactly_zero():
    assert torch.equal(ask(build(SMALL), *make_inputs()), torch.zeros(2, 4, 8, 8))


def test_text_and_time_modulation_begin_silent_and_gates_begin_small():
    torch.manual_seed(0)
    config = DiTConfig(depth=1, width=256, heads=4, sample_size=8)
    network = DiT(config, latent_channels=4, context_width=CONTEXT_WIDTH)
    block = network.transformer_blocks[0]
    x, context = torch.randn(2, 16, 256), torch.randn(2, 7, 256)
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    modulation, _ = network.adaln_single(torch.tensor([10.0, 900.0]), torch.float32)
    assert not modulation.any()
    out = block(x, modulation, context, mask)
    assert torch.equal(out, block(x, modulation, -context, mask))
    assert 0 < (out - x).std() < 0.2


def test_every_parameter_learns_once_the_zeros_have_moved():
    torch.manual_seed(0)
    network = build(SMALL)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter += 0.01 * torch.randn_like(parameter)
    inputs = make_inputs()
    (ask(network, *inputs) - inputs[0]).square().sum().backward()
    # A key's bias adds the same to all scores of a query, and the softmax does not see it: its gradient is 0.
    parameters = [item for item in network.named_parameters() if not item[0].endswith("to_k.bias")]
    assert len(parameters) == len(list(network.parameters())) - 2 * SMALL.depth
    assert [name for name, parameter in parameters if not gradient_size(parameter) > 1e-6] == []


def gradient_size(parameter: Tensor) -> float:
    return 0.0 if parameter.grad is None else parameter.grad.abs().max().item()


@torch.no_grad()
def test_masked_tokens_and_pooled_have_no_influence_and_the_others_do():
    torch.manual_seed(0)
    network = perturbed(build(SMALL))
    x, t, context, mask, pooled = make_inputs()
    out = ask(network, x, t, context, mask, pooled)
    hidden = torch.where(mask[..., None], context, 1e3)
    assert torch.equal(out, ask(network, x, t, hidden, mask, -pooled))
    shown = context.clone()
    shown[0, 2] += 1
    difference = (out - ask(network, x, t, shown, mask, pooled)).abs().amax(dim=(1, 2, 3))
    assert difference[0] > 1e-4
    assert difference[1] == 0


@torch.no_grad()
def test_padding_to_another_length_changes_nothing():
    torch.manual_seed(0)
    network = perturbed(build(SMALL))
    x, t, context, mask, pooled = make_inputs()
    mask = torch.arange(7).expand(2, 7) < 4
    short = ask(network, x, t, context[:, :4], mask[:, :4], pooled)
    torch.testing.assert_close(ask(network, x, t, context, mask, pooled), short, rtol=0, atol=1e-5)


def test_bfloat16_stays_close_and_returns_the_latents_dtype():
    torch.manual_seed(0)
    network = perturbed(build(SMALL), noise=0.02)
    x, t, context, mask, pooled = make_inputs()
    exact = ask(network, x, t, context, mask, pooled).detach()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ask(network, x, t, context, mask, pooled)
    assert mixed.dtype == torch.float32
    assert (mixed - exact).abs().max() < 0.05 * exact.abs().max()
    mixed.sum().backward()
    gradients = [parameter.grad for parameter in network.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    low = ask(network.bfloat16(), x.bfloat16(), t, context.bfloat16(), mask, pooled)
    assert low.dtype == torch.bfloat16
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max()


def test_the_residual_stream_stays_float32_under_autocast():
    network = build(SMALL)
    dtypes = []
    for block in network.transformer_blocks:
        assert isinstance(block, DiTBlock)
        block.register_forward_hook(lambda _, inputs, out: dtypes.append((inputs[0].dtype, out.dtype)))
        block.attn1.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        ask(network, *make_inputs())
    assert dtypes == [torch.bfloat16, (torch.float32, torch.float32)] * SMALL.depth


@pytest.mark.parametrize("size", [(7, 8), (8, 9)])
def test_latents_that_are_no_whole_patches_are_refused(size):
    with pytest.raises(ValueError, match=f"latents of {size[0]} x {size[1]} .* patches of 2"):
        ask(build(SMALL), *make_inputs(size))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": 0}, "depth=0"),
        ({"heads": 0}, "heads=0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"heads": 5}, "width=32 must be a multiple of heads=5"),
        ({"width": 30, "heads": 3}, "width=30 must be a multiple of heads=3, and of 4"),
        ({"sample_size": 9}, "sample_size=9 is not a multiple of patch_size=2"),
        ({"interpolation_scale": 0.0}, "interpolation_scale=0.0 must be positive"),
    ],
)
def test_impossible_shapes_are_refused_by_name(fields, message):
    valid = {"depth": 2, "width": 32, "heads": 4, "sample_size": 8}
    with pytest.raises(ValueError, match=message):
        DiTConfig(**(valid | fields))
