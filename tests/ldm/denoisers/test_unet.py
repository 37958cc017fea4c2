import pytest
import torch
from helpers.denoisers import ask
from torch import Tensor, nn

from ldm.denoisers import UNet, UNetConfig

CONTEXT_WIDTH = 24
SD1_SHAPED = UNetConfig(block_out_channels=(16, 32, 32, 48), heads=4, norm_num_groups=8)
SD2_SHAPED = UNetConfig(
    block_out_channels=(16, 32, 32, 48), heads=(2, 4, 8, 6), norm_num_groups=8, use_linear_projection=True
)
TWO_LEVELS = UNetConfig(
    block_out_channels=(16, 32),
    layers_per_block=1,
    attention_levels=(False, True),
    heads=4,
    norm_num_groups=8,
)
NO_ATTENTION = UNetConfig(
    block_out_channels=(16, 24, 32),
    layers_per_block=1,
    attention_levels=(False, False, False),
    heads=4,
    norm_num_groups=8,
)
CONFIGS = {"SD 1": SD1_SHAPED, "SD 2": SD2_SHAPED, "2 levels": TWO_LEVELS, "mid only": NO_ATTENTION}


def diffusers_unet(config: UNetConfig, in_channels: int = 4, context_width: int = CONTEXT_WIDTH) -> nn.Module:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    names = [("CrossAttn" if attends else "", "Block2D") for attends in config.attention_levels]
    return UNet2DConditionModel(
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        down_block_types=tuple("Down".join(pair) for pair in names),
        up_block_types=tuple("Up".join(pair) for pair in reversed(names)),
        # the number of heads, under the name of their width
        attention_head_dim=config.heads,  # pyright: ignore[reportArgumentType]
        use_linear_projection=config.use_linear_projection,
        norm_num_groups=config.norm_num_groups,
        cross_attention_dim=context_width,
    ).eval()


def perturbed(network: nn.Module, noise: float = 0.05) -> nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += noise * torch.randn_like(parameter)
    return network


def make_inputs(channels: int = 4, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels, *size, generator=generator)
    context = torch.randn(2, 7, CONTEXT_WIDTH, generator=generator)
    mask = torch.arange(7) < torch.tensor([[3], [7]])
    return x, torch.tensor([3.7, 951.0]), context, mask, torch.randn(2, CONTEXT_WIDTH, generator=generator)


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (9, 13)], ids=["even size", "odd size"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_equals_diffusers(config, size):
    torch.manual_seed(0)
    ours = perturbed(UNet(config, latent_channels=4, context_width=CONTEXT_WIDTH))
    theirs = diffusers_unet(config)
    assert shapes(ours) == shapes(theirs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    inputs = make_inputs(size=size)
    out = ask(ours, *inputs)
    assert out.std() > 0.1
    assert (out - theirs(*inputs[:3]).sample).abs().max() <= 1e-5


@torch.no_grad()
def test_inpainting_weights_of_diffusers_load_and_give_its_output():
    torch.manual_seed(0)
    theirs = perturbed(diffusers_unet(TWO_LEVELS, in_channels=9))
    ours = UNet(TWO_LEVELS, latent_channels=4, concat_channels=5, context_width=CONTEXT_WIDTH)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    inputs = make_inputs(channels=9)
    out = ask(ours, *inputs)
    assert out.shape == (2, 4, 8, 8)
    assert (out - theirs(*inputs[:3]).sample).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("config", "context_width", "parameters"),
    [
        (UNetConfig(), 768, 859_520_964),
        (UNetConfig(heads=(5, 10, 20, 20), use_linear_projection=True), 1024, 865_910_724),
    ],
    ids=["SD 1.5", "SD 2.1"],
)
def test_full_size_has_stable_diffusions_parameters(config, context_width, parameters):
    with torch.device("meta"):
        ours = config.build(latent_channels=4, context_width=context_width)
        theirs = diffusers_unet(config, context_width=context_width)
    assert sum(parameter.numel() for parameter in ours.parameters()) == parameters
    assert shapes(ours) == shapes(theirs)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_fresh_network_returns_exactly_zero(config):
    network = config.build(latent_channels=4, context_width=CONTEXT_WIDTH)
    assert torch.equal(ask(network, *make_inputs()), torch.zeros(2, 4, 8, 8))


def test_fresh_residual_branches_are_their_skip_connections():
    network = UNet(TWO_LEVELS, latent_channels=4, context_width=CONTEXT_WIDTH)
    x, time, context = torch.randn(2, 32, 4, 4), torch.randn(2, 64), make_inputs()[2]
    assert torch.equal(network.mid_block(x, time, context), x)


@pytest.mark.parametrize("config", [SD1_SHAPED, SD2_SHAPED], ids=["SD 1", "SD 2"])
def test_every_parameter_learns_once_the_zeros_have_moved(config):
    torch.manual_seed(0)
    network = config.build(latent_channels=4, context_width=CONTEXT_WIDTH)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter += 0.01 * torch.randn_like(parameter)
    inputs = make_inputs(size=(16, 16))
    (ask(network, *inputs) - inputs[0]).square().sum().backward()
    still = [name for name, parameter in network.named_parameters() if not gradient_size(parameter) > 1e-6]
    assert still == []


def gradient_size(parameter: Tensor) -> float:
    return 0.0 if parameter.grad is None else parameter.grad.abs().max().item()


@torch.no_grad()
def test_all_context_positions_are_attended_and_mask_and_pooled_ignored():
    torch.manual_seed(0)
    network = perturbed(TWO_LEVELS.build(latent_channels=4, context_width=CONTEXT_WIDTH))
    x, t, context, mask, pooled = make_inputs()
    out = ask(network, x, t, context, mask, pooled)
    assert torch.equal(out, ask(network, x, t, context, ~mask, -pooled))
    changed = context.clone()
    changed[0, 6] += 1
    difference = (out - ask(network, x, t, changed, mask, pooled)).abs().amax(dim=(1, 2, 3))
    assert difference[0] > 1e-4
    assert difference[1] == 0


def test_bfloat16_stays_close_and_returns_the_latents_dtype():
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(32, 64, 96), layers_per_block=1, attention_levels=(False, True, True), heads=4
    )
    network = perturbed(config.build(latent_channels=4, context_width=CONTEXT_WIDTH), noise=0.02)
    x, t, context, mask, pooled = make_inputs(size=(16, 16))
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_out_channels": (), "attention_levels": ()}, "block_out_channels is empty"),
        ({"attention_levels": (True, False)}, "attention_levels has 2 entries and block_out_channels has 4"),
        ({"heads": (5, 10)}, "heads has 2 entries and block_out_channels has 4"),
        ({"heads": 0}, "heads=0 must be 1 or more"),
        ({"layers_per_block": 0}, "layers_per_block=0"),
        ({"norm_num_groups": 0}, "norm_num_groups=0"),
        ({"norm_num_groups": 3, "block_out_channels": (33,) * 4}, "=33 must be even"),
        ({"block_out_channels": (320, 650, 1280, 1280)}, "=650 is not a multiple of norm_num_groups=32"),
        ({"block_out_channels": (320, 0, 1280, 1280)}, "=0 is not a multiple of norm_num_groups=32"),
        ({"heads": 7}, r"block_out_channels\[0\]=320 is not a multiple of its 7 heads"),
        ({"heads": (5, 10, 20, 7)}, r"block_out_channels\[3\]=1280 is not a multiple of its 7 heads"),
    ],
)
def test_impossible_shapes_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**fields)


def test_levels_without_attention_need_no_divisor_for_heads():
    config = UNetConfig(block_out_channels=(32, 96), attention_levels=(False, True), heads=(5, 6))
    assert config.build(latent_channels=4, context_width=CONTEXT_WIDTH) is not None
